"""Train a Flamingo.

    python train.py                                       the classroom: offline, minutes on a laptop
    python train.py --data my_pictures                    a folder of captioned pictures (see flamingo/data/captions.py)
    python train.py --preset opt-125m                     the real recipe: one GPU and a hub connection
    python train.py --resume runs/classroom               go on with a run that was stopped

What this file teaches: parse → build → a plain loop. Everything that trains a Flamingo is in `main`, top to bottom.
"""

import time

LAUNCHED = time.time()

import sys  # noqa: E402

from flamingo.errors import run_command  # noqa: E402
from flamingo.options import TrainingOptions, model_settings, parse_training_options  # noqa: E402


def main(options: TrainingOptions) -> None:
    import torch
    from tqdm import tqdm

    from flamingo import training
    from flamingo.build import build_flamingo
    from flamingo.checkpoint import save_model, write_json
    from flamingo.config import FlamingoConfig
    from flamingo.data.batches import Collate, batches
    from flamingo.data.feature_cache import with_cached_features
    from flamingo.data.sources import training_sets
    from flamingo.evaluation.first_look import first_look
    from flamingo.interop.selfcheck import check_decoding
    from flamingo.resume import FILE as RESUME_FILE
    from flamingo.resume import restore, save_resume_point
    from flamingo.run_log import RunLog

    # ------------------------------------------------------------------------------------------------ build
    torch.manual_seed(options.seed)
    device = training.pick_device(options.device)
    training.tune(device)
    config = FlamingoConfig(**model_settings(options))
    model, processor = build_flamingo(config)
    model.to(device).train()
    print(training.describe(model))
    counts = dict(zip(("trainable_parameters", "frozen_parameters"), training.count_parameters(model), strict=True))
    train_set, validation_set = training_sets(options)
    folder = training.run_folder(options)
    train_examples, validation_examples = (
        with_cached_features(examples, model.vision_encoder, options.cache, device=device, workers=options.workers)
        for examples in (train_set, validation_set)
    )
    optimizer = training.make_optimizer(model, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first_step, dtype = restore(folder, model, optimizer) if options.resume else (0, options.dtype)
    log = RunLog(folder, options, LAUNCHED, [*train_set.skipped, *validation_set.skipped], first_step)

    collate = Collate(processor, options.max_tokens)
    prepare = {"batch_size": options.batch_size, "workers": options.workers, "pin": device.type == "cuda"}
    count, done = options.steps * options.accumulate, first_step * options.accumulate
    stream = iter(batches(train_examples, collate, steps=count, skip=done, seed=options.seed, **prepare))
    held_out = list(batches(validation_examples, collate, steps=options.eval_batches, seed=0, **prepare))
    if dtype == "auto":
        dtype = "bfloat16" if training.bf16_pays(model, held_out[0], device) else "float32"
    if dtype == "bfloat16":
        training.hold_frozen_in_bf16(model)
    if options.gradient_checkpointing:
        training.checkpoint_layers(model)
    if options.compile:
        training.compile_trained_parts(model)
    print(f"training {len(train_set)} examples on {device} in {dtype}; run folder {folder}")
    if not options.resume:
        save_resume_point(folder, model, optimizer, options, 0, dtype)

    # ------------------------------------------------------------------------------------------------- loop
    bar = tqdm(range(first_step, options.steps), initial=first_step, total=options.steps, desc="train", unit="step")
    for step in bar:
        training.set_learning_rate(optimizer, step, options)
        group = [next(stream) for _ in range(options.accumulate)]
        targets = max(1, sum(batch.targets for batch in group))
        loss = torch.zeros((), device=device)
        for batch in group:
            share = batch.targets / targets  # so that every token counts the same, whichever batch it came in
            with training.autocast(device, dtype):
                part = model(**batch.to(device).inputs()).loss * share
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        log.step(step, loss, sum(len(batch.input_ids) for batch in group), optimizer, bar)
        if (step + 1) % options.eval_every == 0 or step + 1 == options.steps:
            log.validation(step + 1, training.validate(model, held_out, device, dtype), model.gates(), bar)
            log.samples(model, processor, validation_set, training.autocast(device, dtype), bar)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_resume_point(folder, model, optimizer, options, step + 1, dtype)
            training.give_back_freed_memory()

    # ------------------------------------------------------------------------------------------------- save
    save_model(folder, model, processor, config)
    forward = lambda: training.autocast(device, dtype)  # noqa: E731
    check_decoding(model, forward)  # raises where captions would be nonsense; the weights are safe by now
    look = first_look(model, processor, validation_set, forward, options.seed)
    summary = log.summary(device, dtype) | counts | {"validation_captions": look and look.facts}
    write_json(folder / "summary.json", summary)  # last: a run folder with a summary is a whole one
    (folder / RESUME_FILE).unlink()
    print(
        f"trained for {summary['seconds']:.0f} s: validation loss {summary['final_val_loss']:.3f} with the picture, "
        f"{summary['final_val_loss_blind']:.3f} without\n"
        + (f"{look.sentence}\n" if look else "")
        + f"look at {folder}/samples.png, then: python evaluate.py {folder}"
    )
    if device.type == "cuda" and options.preset == "classroom":
        free = torch.cuda.get_device_properties(device).total_memory / 2**30
        print(f"this GPU has {free:.0f} GiB: `python train.py --preset opt-125m` would fit it (needs about 8)")


if __name__ == "__main__":
    run_command("train.py", lambda: main(parse_training_options(sys.argv[1:])))
