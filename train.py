"""Train a Flamingo.

    python train.py                                       the classroom: offline, minutes on a laptop
    python train.py --data my_pictures                    a folder of captioned pictures (see flamingo/data/captions.py)
    python train.py --preset photos --data my_photos      photographs and a language model that knows English, no hub
    python train.py --preset classroom-kosmos             another architecture (flamingo/presets.py)
    python train.py --preset opt-125m                     the real recipe: one GPU and a hub connection
    python train.py --resume runs/classroom               go on with a run that was stopped
    torchrun --nproc-per-node 4 train.py                  on several GPUs (flamingo/training/distributed.py)

What this file teaches: parse → build → a plain loop. Everything that trains a Flamingo is in `main`, top to bottom.
"""

import time

LAUNCHED = time.time()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from flamingo import ranks  # noqa: E402
from flamingo.config import TrainingOptions  # noqa: E402
from flamingo.errors import run_command  # noqa: E402
from flamingo.presets import is_text_only, language_model_on_hub, model_config  # noqa: E402
from flamingo.run_folder import in_run_folder  # noqa: E402
from flamingo.training.command_line import parse_training_options  # noqa: E402


def main(options: TrainingOptions, folder: Path) -> None:
    import torch
    from tqdm import tqdm

    from flamingo.data.batches import Collate, batches
    from flamingo.data.feature_cache import with_cached_features
    from flamingo.evaluation.first_look import validation_items
    from flamingo.fast import checkpointing, compiling, device, enable, precision
    from flamingo.interop.backbones import build_flamingo
    from flamingo.training import best, distributed, finish, loop, optimizer, resume, sources, where
    from flamingo.training.log import RunLog

    # ------------------------------------------------------------------------------------------------ build
    torch.manual_seed(options.seed)
    place = device.pick_device(options.device)
    device.tune(place)
    model, processor, config = build_flamingo(model_config(options), max_tokens=options.max_tokens)
    model.to(place).train()
    counts = loop.count_parameters(model)  # now: flamingo/fast may keep a frozen matrix as no parameter
    print(loop.describe(model))
    train_set, validation_set = sources.training_sets(options, config)
    distributed.check(options, (train_set, validation_set))
    asked = where.ask_where(model, options.where_weight)
    collating = {"layout": not options.plain, "places": asked, "room": model.room_of_texts()}
    collate = Collate(processor, options.max_tokens, **collating)
    sources.check_targets(train_set, validation_set, collate)
    train_examples, validation_examples = (
        with_cached_features(examples, model.vision_encoder, options.cache, device=place, workers=options.workers)
        for examples in (train_set, validation_set)
    )
    loop.fit_features(model, train_examples, collate, place)
    adamw = optimizer.make_optimizer(model, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    points = resume.ResumePoints(folder, model, adamw, options, config, (train_set, validation_set))
    first_step, dtype = points.restore() if options.resume else (0, options.dtype)
    log = RunLog(folder, options, LAUNCHED, [*train_set.skipped, *validation_set.skipped], first_step)
    kept = best.Best(folder, model, log, options.patience)

    prepare = {"batch_size": options.batch_size, "workers": options.workers, "pin": place.type == "cuda"}
    validations = loop.validation_batches(options, model, collate, train_examples, validation_examples)
    count, done = options.steps * options.accumulate, first_step * options.accumulate
    joining = Collate(processor, options.max_tokens, **collating, join=sources.texts_in_a_row(train_set))
    stream = iter(batches(train_examples, joining, steps=count, skip=done, seed=options.seed, **prepare))
    held_out = list(batches(validation_examples, collate, steps=validations, seed=0, **prepare))
    reopening = sources.first_lookup(train_set, options)  # a step
    shown = validation_items(validation_set, options.seed)
    if not options.plain:
        enable.enable(model)  # the same numbers, sooner
    if dtype == "auto":
        faster = ranks.of_first(lambda: precision.bf16_is_faster(model, held_out[0].first(10).inputs(), place))
        dtype = "bfloat16" if faster else "float32"
    if dtype == "bfloat16":
        precision.cast_frozen_to_bf16(model)
    if options.gradient_checkpointing:
        checkpointing.checkpoint_layers(model)
    if options.compile:
        compiling.compile_trained_parts(model)
    together = distributed.for_training(model, place, options.shard)  # alone, the model itself
    print(f"training {sources.described(train_set)} on {place} in {dtype}; run folder {folder}")
    if not options.resume:
        points.save(0, dtype)

    # ------------------------------------------------------------------------------------------------- loop
    bar = tqdm(range(first_step, options.steps), initial=first_step, total=options.steps, desc="train", unit="step")
    for step in bar:
        optimizer.set_learning_rate(adamw, step, options, reopening)
        group = [loop.some_patches(next(stream), step, options) for _ in range(options.accumulate)]
        loop.seed_dropout(step, options)
        targets, captions = ranks.total(sum(b.targets for b in group), sum(b.captions for b in group))
        loss = torch.zeros((), device=place)
        for batch in group:
            share = batch.targets / max(1, targets)  # so that every token counts the same, whichever batch it came in
            with distributed.adding_up(together, now=batch is group[-1]):
                with precision.autocast(place, dtype):
                    part = together(**batch.to(place).inputs()).loss * share
                part.backward()
            loss += part.detach()
        ranks.add_up(loss)
        norm = torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
        loss = loop.finite_loss(step, loss, norm, train_set, points, log.left_out)
        if loss is not None:  # else the step is left out
            adamw.step()
            optimizer.open_gates(model, step, options, reopening)
        adamw.zero_grad(set_to_none=True)

        log.step(step, loss, int(captions), adamw, bar)
        if (step + 1) % options.eval_every == 0 or step + 1 == options.steps:
            score = log.samples(model, processor, shown, lambda: precision.autocast(place, dtype), bar)
            log.validation(step + 1, loop.validate(model, held_out, place, dtype) | score, model.gates(), bar)
            if kept.should_stop():
                break
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            points.save(step + 1, dtype)
            device.give_back_freed_memory()

    bar.close()
    kept.restore()
    finish.finish(folder, model, processor, config, shown, log, counts, place, dtype)


def start(argv: list[str]) -> None:
    with ranks.joined("train.py"):  # the processes that torchrun started, if it did
        options, work = parse_training_options(argv), main
        if is_text_only(options.preset):
            from flamingo.training.text import train_on_text as work
        elif name := language_model_on_hub(options):
            from flamingo.interop.hub import must_be_at_hand

            must_be_at_hand(name)
        in_run_folder(work, options)


if __name__ == "__main__":
    run_command("train.py", lambda: start(sys.argv[1:]))
