"""Start the page.

    python -m flamingo.demo                    the committed classroom model
    python -m flamingo.demo runs/classroom     any run folder

It is served to this machine only (127.0.0.1), without a share link or telemetry, and asks nothing of the network.
"""

import argparse
import os
import socket
import sys
import time
from pathlib import Path

from flamingo.demo.remote import RemoteModel
from flamingo.errors import InputError, OneSentenceParser, run_command
from flamingo.files import asset
from flamingo.limits import in_range

HOST, PORT, TRIED = "127.0.0.1", 7860, 100
# What a browser may load for the page: what this machine serves, whatever the page's own libraries ask for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: mediastream:"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneSentenceParser(prog="python -m flamingo.demo", description="A page to try a model by hand.",
                               allow_abbrev=False)  # fmt: skip
    parser.add_argument("run", nargs="?", type=Path, default=None,
                        help="run folder that train.py wrote (default: the classroom's)")  # fmt: skip
    parser.add_argument("--port", type=int, default=PORT, help="the first port to try (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    args = parser.parse_args(argv)
    in_range("--port", args.port, 1, 65535)
    return args


def free_port(first: int) -> int:
    """The first port from `first` on that nobody listens at. Raises InputError if all are in use."""
    for port in range(first, min(first + TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                return port
            except OSError:
                continue
    raise InputError(f"no port from {first} on is free: choose another --port")


def main(argv: list[str]) -> None:
    args = parse(argv)
    run = args.run.expanduser() if args.run else asset("classroom/flamingo")
    demo = RemoteModel(run, args.device)  # it loads while this process imports Gradio
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    os.environ.setdefault("MPLBACKEND", "Agg")  # nothing here opens a window
    try:
        import gradio as gr
    except ImportError:
        raise InputError("the page needs Gradio: pip install -r requirements-demo.txt -c constraints.txt") from None
    import matplotlib.pyplot  # noqa: F401  Gradio would import it at the first click: now, while the model is loaded
    from starlette.middleware import Middleware

    from flamingo.demo.headers import Headers
    from flamingo.demo.page import page
    from flamingo.demo.parts import CSS

    blocks = page(demo)  # which waits for the model
    port = free_port(args.port)
    if port != args.port:
        print(f"port {args.port} is in use: taking {port}")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # the machine's own
    _, address, _ = blocks.launch(
        server_name=HOST, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
        footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, max_file_size="50mb",
        theme=gr.themes.Default(primary_hue="teal", **fonts), css=CSS,
        app_kwargs={"middleware": [Middleware(Headers, policy=POLICY)]},
    )  # fmt: skip
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    run_command("python -m flamingo.demo", lambda: main(sys.argv[1:]))
