"""Ours beside OpenFlamingo 2.0.1, on the same machine, in the same run, with the same weights.

    python -m benchmarks.train       captions per second: features cached, from pixels, one caption a picture
    python -m benchmarks.decode      time of a decode step: 1 and 8 texts, 3 beams, 1 and 5 pictures a text
    python -m benchmarks.memory      peak memory of a training step, each side in a process of its own
    python -m benchmarks.growth      how time grows with pictures, captions, text length and latents

and ours alone:

    python -m benchmarks.precision   does bfloat16 learn what float32 learns?
    python -m benchmarks.classroom   what a step of the default run spends its time on
    python -m benchmarks.pieces      what each piece of flamingo/fast is worth beside the plain model
    python -m benchmarks.kills       what a run, an evaluation and a cache build keep when they are killed

Weights are random, of the shapes of OPT-125m and ViT-L-14: time does not depend on their values, and nothing has to be
downloaded. Both sides have the same ones, and before anything is timed their losses are compared.
"""
