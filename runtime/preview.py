"""`train.py --dry_run`: a segment in words, and what the run would refuse; nothing is written, no device is touched."""

import tempfile
from pathlib import Path

from runtime import resume
from runtime.distributed import World
from runtime.errors import UserError
from runtime.resume import Run
from runtime.start import check_shipped, check_start, find_start, open_data
from text import prepare


def preview(run: Run, kind: str, why: str, ranks: int) -> None:
    """Print the segment, its LR, sizes, batch and tokens. UserError at the end where the run would refuse."""
    sft, problem = run.segment.paradigm == "sft", None
    try:
        if not sft and prepare.ships(run.config.data.path):
            check_shipped(run)
        else:
            with tempfile.TemporaryDirectory() as scratch:  # a fine-tuning has its number of steps only now
                run, data = open_data(run, World(), lambda doing: None, Path(scratch))
                check_start(run, data, find_start(run, data), checksums=False)
    except UserError as e:
        if sft:  # without examples there is nothing to say
            raise
        problem = e
    c, t, m = run.config, run.config.train, run.config.model
    s, p, required = run.segment, run.plan, run.required
    tokens, flops = (s.end - s.start) * t.batch_tokens, m.flops_per_token()
    begin = f"from {run.origin or 'random weights'}"
    if (own := resume.resume_step(run.folder, required)) is not None:
        begin = "finished" if own == required[-1] else f"goes on from {run.folder} at step {own:,}"
    print(f"segment      {s.name}: steps {s.start:,} .. {s.end:,} ({s.end - s.start:,}), {begin}")
    milestones = {s.start, s.start + p.warmup - 1, *(p.end(i + 1) - 1 for i in range(len(p.T))), *required, s.end - 1}
    rates = [f"update {i:>9,}: {s.lr(i):.6g}" for i in sorted(milestones) if s.start <= i < s.end]
    print("LR           " + "\n             ".join(rates))
    regular = f" (and the last {t.keep} of every {t.checkpoint_every:,} steps)" if t.checkpoint_every else ""
    print(f"saves        {', '.join(f'{step:,}' for step in required)}{regular}, in {run.folder}")
    print(f"parameters   {m.parameters:,}")
    print(f"FLOPs        {flops / 1e9:,.4g} GFLOP a token, {flops * tokens:.4g} in all")
    shards = (t.shard_ranks or ranks) if kind == "fsdp" else 1
    held = f"{16 * m.parameters / shards / 1e9:.3g} GB a rank"  # float32 weights, gradients, two moments
    held += ", and all weights and gradients while a step computes" * (kind == "fsdp")
    print(f"parallel     {kind} ({why}): weights, gradients and moments take {held}")
    accumulation = t.batch_tokens // (t.micro_batch * m.context * ranks)
    pieces = f"micro-batch {t.micro_batch} x context {m.context} x accumulation {accumulation} x {ranks} rank"
    print(f"batch        {t.batch_tokens:,} tokens = {pieces}{'s' * (ranks > 1)}")
    if not sft and prepare.ships(c.data.path):
        print(f"data         {c.data.path}: not there yet, the text that ships with the project will be prepared")
    elif not sft and (Path(c.data.path) / "meta.json").exists():
        for name, need, there in resume.open_tokens(c, p).needs(s.start, s.end):
            print(f"data         {Path(c.data.path) / name}.bin: {need:,} tokens needed, {there:,} there")
    if problem:
        raise problem
