"""Every mistake at the command line is one message, without a trace."""

import shlex
from pathlib import Path

import torch

from tests.unit.cli.conftest import Say
from tests.unit.runs.trained_runs import make_run

MISTAKES = {
    "trian": "there is no command 'trian'. Did you mean 'train'? See: ultrathink --help\n",
    "--verbose": "there is no option '--verbose'.",
    "train demmo": "there is no preset 'demmo'. Did you mean 'demo'?",
    "train missing.yaml": "there is no file missing.yaml",
    "train runs/lr=0.1/my.yaml": "there is no file runs/lr=0.1/my.yaml",  # which is no override
    "train debug training.batch_size=many": "should be a whole number",
    "train debug x": "'debug' and 'x' are given as configurations, but there can be only one",
    "train debug 'data.train=[{type: text, path: nothing.txt}]'": "nothing.txt",
    "train debug training.device=cuda:7": "use auto or cpu",
    "train debug training.init_from=nowhere": "there is no run 'nowhere'",
    "train debug --reset optimizer": "--reset belongs to --resume",
    "train --resume nowhere": "there is no run 'nowhere'",
    "train demo --resume a": "takes no other (demo)",
    "train b --resume a": "train b training.init_from=a",
    "train --max_steps 10": "--max_steps is not known here. Write training.max_steps=10. See: ultr",
    "train --learning_rate=1e-4": "Write training.optimizer.lr=0.0001.",
    "launch --lr 0.1 --bf16 --seed 3": "--lr is not known here. Write training.optimizer.lr=0.1.\n"
    "       --bf16 is not known here. Write training.precision=bf16.\n"
    "       --seed is not known here. Write run.seed=3. See: ultrathink launch --help",
    "doctor --training.batch_size 4": "Write training.batch_size=4 (the sequences of a whole step",
    "train --optimizer.lr=1": "Write training.optimizer.lr=1.",
    "train --config my.yaml": "Name the file itself: ultrathink train my.yaml",
    "train --lr_scheduler_type linear": "Write 'training.schedule={type: wsd, decay: 95%}'.",
    "train --resum x": "--resum is not known here; did you mean --resume? See: ultrathink train",
    "train --res a": "--res is not known here",  # no abbreviations, which new flags would break
    "train --zzz=3": "--zzz is not known here. See: ultrathink train --help",
    "generate nowhere x": "there is no run 'nowhere'",
    "generate a@5000 x": "no checkpoint of step 5000; there are: 2, 4",
    "generate a x --temperature -1": "temperature",
    "generate a x --seed": "error: --seed: give a value. See:",
    "launch --nnodes 2 debug": "--nnodes 2: name one of the machines and a port, the same on ",
    "launch --nproc x debug": "--nproc 'x': give a whole number. See: ultrathink launch --help",
    "launch --nproc 0 debug": "--nproc is 0; it must be at least 1",
    "launch --nprocs=2 debug": "did you mean --nproc?",
    "export nowhere": "there is no run 'nowhere'",
    "export a --checkpoint 6": "has no checkpoint of step 6; there are: 2, 4",
    "export a --format onnx": "invalid choice: 'onnx'",
    "export a --dtype int8": "invalid choice: 'int8'",
    "export a@4 --checkpoint last": "both name a checkpoint; give one",
    "runs nowhere": "there is no folder nowhere. Runs are in runs/",
    "runs runs/a": "to check it: ultrathink runs check runs/a",
    "runs --data": "--data belongs to a check: ultrathink runs check",
    "runs chek a": "runs check a",
    "runs check": "say which run to check",
    "runs check a b": "one at a time, not a b",
    "runs check aaa": "there is no run 'aaa'.",
    "runs check b@7": "no checkpoint yet",
    "checkpoint inf a": "there is no action 'inf'; did you mean info?",
    "checkpoint consolidate a --output folder": "folder exists already and is not overwritten",
    "compare": "name at least two runs to compare, none is given; for example: ",
    "compare a": "only 'a' is given; for example: ultrathink compare a demo-2",
    "compare a bb": "there is no run 'bb'. Known: a, b.",
    "report aa": "there is no run 'aa'.",
    "report a --out nowhere/page.html": "--out: there is no folder 'nowhere'; make it first",
    "report a --out runs": "--out: 'runs' is a folder; name a file in it",
    "report runs": "runs is not a run folder",
    "report": "RUN",
    "config": "say what to do: ultrathink config show|check|docs|schema\n",
    "config shw": "not 'shw'. Did you mean 'show'?",
    "config check --why": "--why belongs to 'config show', not to 'config check'",
    "config schema demo": "takes none, not 'demo'",
    "config docs --json": "prints Markdown; for JSON there is 'config schema'",
    "config check debug data.train=nowhere/": "path 'nowhere/' does not exist",
    "config check debug data.train=folder/": "is a folder without files that this source can read",
    "config check debug data.train=./binary": "binary is a binary file, not text",
    "config check debug data.val=[./log.csv,nowhere.jsonl]": "path 'nowhere.jsonl' does not exist",
    "config check debug training.init_from=nowhere": "there is no run 'nowhere'",
    "config check debug training.init_from=b": "no checkpoint yet",
    "config check debug tokenizer=hf": "set training.init_from=hf:PATH_OR_NAME, or choose",
    "config check debug training.device=cuda:7": "use auto or cpu",
    "config check debug training.checkpoint.best_by=acc": "'acc': objective 'pretrain' has no such",
    "config check debug run.dir=prose/runs": "run.dir = 'prose/runs': ",
    "config check debug 'training.objective={type: distill, teacher: c}'": "the teacher of this",
    "config check 'training.evaluators=[{type: text, source: none.txt}]'": "'none.txt' does not",
    "config show --plugin nowhere.py": "--plugin nowhere.py: there is no such file.",
    "config check demo model.num_layers=x run.nam=1": "= 'x' (override): should be a whole numb",
    "watch": "the following arguments are required: FILE",
    "watch none.csv": "there is no file 'none.csv' and no run of that name.\n",
    "watch log.cvs": "Did you mean 'log.csv'?",
    "watch empty": "empty is empty: there is nothing to watch yet.",
    "watch folder": "folder is a folder without metrics.jsonl",
    "watch prose": "prose is no training log that is known here",
    "watch binary": "binary is a binary file",
    "watch unknown": "seen: a, b. Name them: --columns loss=COLUMN,step=COLUMN",
    "watch log.csv --columns loss=lss": "log.csv has no column 'lss'. Did you mean 'loss'?",
    "watch log.csv --columns loss": "'loss' is not SIGNAL=COLUMN",
    "watch log.csv --plot course.txt": "'course.txt' does not end in .png, .svg, .pdf",
    "watch log.csv --plot no/course.png": "there is no folder 'no'; make it first",
}
if not torch.cuda.is_available():
    MISTAKES["launch debug"] = "this machine shows no GPU; say how many processes to start"
FILES = {
    "empty": b"",
    "prose": b"Call me Ishmael.\nSome years ago, never mind how long.\n",
    "binary": b"\0\1\2",
    "unknown": b"a,b\n1,2\n",
    "log.csv": b"step,loss\n1,2\n2,1.5\n",
}


def test_a_mistake_is_one_message(place: Path, say: Say) -> None:
    make_run(Path("runs"), "a", saved=[2, 4])
    make_run(Path("runs"), "b")
    Path("folder").mkdir()
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    before = sorted(place.rglob("*"))
    for words, message in MISTAKES.items():
        said = say(*shlex.split(words), status=2)
        assert [line.startswith("error: ") for line in said.splitlines()].count(True) == 1, words
        assert message in said, (words, said)
        assert "Traceback" not in said, words
    left = [path for path in sorted(place.rglob("*")) if path not in before]
    assert {path.name for path in left} <= {".lock"}
    lines = say(*shlex.split("config check demo model.num_layers=x run.nam=1"), status=2)
    assert lines.count("\n       ") == 1  # each thing that is wrong on a line of its own
