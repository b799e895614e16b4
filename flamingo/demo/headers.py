"""A header on every answer that forbids the browser to load anything from elsewhere."""


class Headers:
    """An ASGI middleware: adds the Content-Security-Policy `policy`."""

    def __init__(self, app, policy: str):
        self.app, self.header = app, (b"content-security-policy", policy.encode())

    async def __call__(self, scope, receive, send) -> None:
        async def with_header(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], self.header]
            await send(message)

        await self.app(scope, receive, with_header)
