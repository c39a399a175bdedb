"""Token files that other projects made, nanoGPT's and llm.c's -> a prepared folder."""

from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import make_folder
from text.prepare import print_summary
from text.sources import Source, hashes, progress_bar
from text.token_files import Writer, id_dtype, write_meta
from text.tokenizer import Tokenizer

LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # magic number and version of llm.c: GPT-2, Llama 3
HEADER = 1024  # bytes of llm.c's header: 256 int32, of them magic number, version, tokens
BLOCK = 1 << 24  # ids searched at a time, so that memory stays small


def read_bin(file: Path, tok: Tokenizer) -> np.ndarray:
    """The ids of a token file, mapped into memory: nanoGPT's (uint16 alone) or llm.c's (after a header)."""
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: is no file; expected token ids of nanoGPT or llm.c")
    size, head = file.stat().st_size, np.fromfile(file, "<i4", 256)
    magic, version, count = head[:3].tolist() if len(head) == 256 else (0, 0, 0)
    start, dtype = 0, "<u2"
    if (magic, version) in LLMC:
        start, dtype = HEADER, LLMC[magic, version]
        if (got := size - start) != (need := np.dtype(dtype).itemsize * count):
            raise UserError(f"{file}: got {got:,} bytes after its header, expected {need:,}; fetch it again")
    elif magic in {m for m, _ in LLMC} or (20_200_000 < magic < 20_400_000 and not head[3:].any()):
        expected = " or ".join(f"{m}, version {v}" for m, v in LLMC)
        raise UserError(f"{file}: magic number {magic}, version {version}; expected {expected} (llm.c), or none")
    elif size % 2:
        raise UserError(f"{file}: got {size:,} bytes, expected an even number: 2 for each id (nanoGPT)")
    elif tok.vocab_size > 1 << 16:
        raise UserError(f"{file}: ids of 2 bytes, but the {tok.vocab_size:,} of tokenizer {tok.name} need 4")
    if size == start:
        raise UserError(f"{file}: is empty, expected token ids")
    return np.memmap(file, dtype, "r", start)


def find_documents(file: Path, ids: np.ndarray, tok: Tokenizer, bar: tqdm) -> np.ndarray:
    """(first, end, hash of the text, as `add` needs it) of each document that is not empty, uint64 (n, 3)."""
    separators = []  # <|endoftext|> ends documents, as nanoGPT writes it, or begins them, as llm.c does
    for low in range(0, len(ids), BLOCK):
        part = np.asarray(ids[low : low + BLOCK])
        if part.max() >= tok.vocab_size:
            raise UserError(f"{file}: token id {part.max()}, expected below the vocabulary's {tok.vocab_size}")
        separators.append(low + np.flatnonzero(part == tok.eot))
    edges = np.concatenate(([-1], *separators, [len(ids)]))
    found = []
    for first, end in zip(edges[:-1] + 1, edges[1:], strict=True):
        if first < end:
            own = ids[first:end].tolist()
            text = tok.decode(own)
            if "\ufffd" in text:  # of bytes that are no character: other ids may be decoded alike
                text += str(own)
            found.append((first, end, hashes(text)[0]))
        bar.update(int(end - first) + 1)
    return np.array(found, np.uint64).reshape(-1, 3)


def bins(out: str, val: str, files: list[str], tokenizer: str) -> None:
    """Make the folder `out` from token files, one for validation and one for each increment."""
    folder = Path(out).resolve()  # links to one folder share its lock
    tok = Tokenizer(tokenizer)
    if tok.decode(tok.encode("abc")) != "abc":
        raise UserError(f"--tokenizer {tokenizer}: changes texts, so `add` could not know them; prepare the texts")
    dtype = np.dtype(id_dtype(tok.vocab_size))
    paths, written, sources = [Path(f) for f in (val, *files)], [], []
    seen = np.empty(0, np.uint64)  # hashes of the documents taken: validation's first, then v1's and so on
    with make_folder(folder) as partial:
        opened = [read_bin(f, tok) for f in paths]
        with progress_bar("reading", sum(map(len, opened)), unit="token", delay=2) as bar:
            for i, (file, ids) in enumerate(zip(paths, opened, strict=True)):
                docs = find_documents(file, ids, tok, bar)
                firsts = np.unique(docs[:, 2], return_index=True)[1]  # of equal documents in this file
                kept = docs[np.sort(firsts)]
                kept = kept[~np.isin(kept[:, 2], seen)]
                seen = np.concatenate((seen, kept[:, 2]))
                if not len(kept):
                    raise UserError(f"{file}: has no document of its own; expected one at least")
                writer = Writer(partial, f"v{i}" if i else "val", dtype)
                # in their order, each ended by <|endoftext|>, also one cut off at the end of a file
                for (first, end), h in zip(kept[:, :2].tolist(), np.sort(kept[:, 2]).tolist(), strict=True):
                    writer.write(h, np.append(ids[first:end], tok.eot).astype(dtype).tobytes())
                written.append(writer.close())
                left_out = Counter(duplicates=len(docs) - len(kept))
                sources.append(Source(str(file), [file], left_out, writer.documents, writer.tokens))
        write_meta(partial, tok, {"increments": len(files), "from": [val, *files], "weights": None}, written)
    print_summary(folder, written, sources)
