"""`train.py --dry_run`: a segment in words, without touching the disk or a device."""

import tempfile
from pathlib import Path

from runtime import checkpoint, resume
from runtime.resume import Run
from text.examples import Examples, SFTData, prepare_examples


def preview(run: Run, kind: str, why: str, ranks: int) -> None:
    """Print the segment, its LR at the milestones, sizes, the batch, and the tokens needed and there."""
    c, t, m = run.config, run.config.train, run.config.model
    examples = None
    if run.reads_examples:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare_examples(c.data.sft, resume.examples_tokenizer(run), Path(folder))
            examples = Examples(prepared, m.context, t.seed)
            if run.segment.paradigm == "sft":
                steps = SFTData(examples, run.meta["data"], c.batch_sequences, c.data.epochs).steps
                run = resume.sft_run(c, run.meta, str(run.parent), steps)
    s, p, required = run.segment, run.plan, run.required
    tokens, flops = (s.end - s.start) * t.batch_tokens, m.flops_per_token()
    planned = f"{s.parent[0]} at step {s.parent[1]:,}" if s.parent else t.base or "random weights"
    print(f"segment      {s.name}: steps {s.start:,} .. {s.end:,} ({s.end - s.start:,}), from {run.parent or planned}")
    milestones = {s.start, s.start + p.warmup - 1, *(p.end(i + 1) - 1 for i in range(len(p.T))), *required, s.end - 1}
    rates = [f"update {i:>9,}: {s.lr(i):.6g}" for i in sorted(milestones) if s.start <= i < s.end]
    print("LR           " + "\n             ".join(rates))
    regular = f" (and the last {t.keep} of every {t.checkpoint_every:,} steps)" if t.checkpoint_every else ""
    print(f"saves        {', '.join(f'{step:,}' for step in required)}{regular}, in {run.folder}")
    print(f"parameters   {m.parameters:,}")
    print(f"FLOPs        {flops / 1e9:,.4g} GFLOP a token, {flops * tokens:.4g} in all")
    state = 16 * m.parameters / 1e9  # float32 weights, gradients, two moments
    held = f"{state:.3g} GB a rank"
    if kind == "fsdp":
        held = f"{state / (t.shard_ranks or ranks):.3g} GB a rank, and all weights and gradients while a step computes"
    print(f"parallel     {kind} ({why}): weights, gradients and moments take {held}")
    accumulation = t.batch_tokens // (t.micro_batch * m.context * ranks)
    print(
        f"batch        {t.batch_tokens:,} tokens = micro-batch {t.micro_batch} x context {m.context} x "
        f"accumulation {accumulation} x {ranks} rank{'s' * (ranks > 1)}"
    )
    if examples:
        print(f"examples     {examples}")
    if (step := resume.resume_step(run.folder, required)) is not None:
        print(f"goes on      from {checkpoint.path(run.folder, step)}")
    if s.paradigm != "sft":
        preview_data(run, tokens)


def preview_data(run: Run, read: int) -> None:
    """Print the tokens that the segment needs of each increment, and those there."""
    c = run.config
    if not (Path(c.data.path) / "meta.json").exists():
        make = f"python data.py prepare --out {c.data.path} --tokenizer NAME --source TEXT"
        print(f"data         {c.data.path}: not there yet; {read:,} tokens are read; make it: {make}")
        return
    tokens = resume.open_tokens(c, run.plan)
    if (size := tokens.meta["vocab_size"]) != c.model.vocab_size:
        print(f"data         {tokens.folder}: its vocabulary is {size:,}: train.py would refuse")
    for name, need, there in tokens.needs(run.segment.start, run.segment.end):
        short = "; too few: train.py would refuse" if there < need and not c.data.repeat else ""
        print(f"data         {tokens.folder / name}.bin: {need:,} tokens needed, {there:,} there{short}")
