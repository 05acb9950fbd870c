"""What trainers print: one small piece of each, and what must be read in it."""

import math
from pathlib import Path

import pytest

from ultrathink.insight.logs.formats import FORMATS
from ultrathink.insight.logs.log import NotYetError
from ultrathink.insight.logs.names import ALIASES
from ultrathink.insight.logs.opening import open_log

Read = list[tuple[int, dict[str, float]]]


CASES: dict[str, tuple[str, str, Read]] = {
    "llm.c's main.log": (
        "llm.c's main.log",
        "s:0 tel:11.5\ns:0 trl:11.2 lr:0.000001 norm:15.37\ns:1 trl:10.9 lr:0.000002 norm:15.2\n"
        "s:1 eval:0.25\n",
        [
            (0, {"val_loss": 11.5, "loss": 11.2, "lr": 1e-6, "grad_norm": 15.37}),
            (1, {"loss": 10.9, "lr": 2e-6, "grad_norm": 15.2, "val_accuracy": 0.25}),
        ],
    ),
    "llm.c": (
        "llm.c",
        "allocated 500 MiB\n"
        "step    1/74 | loss   11.000000 (+nanz)| norm 15.50 (+nanz)| lr 3.00e-04 | 36.50 ms | "
        "9.2% bf16 MFU | 112241 tok/s\n"
        "val loss 10.5\n"
        "step    2/74 | loss     nan (+nanz)| norm    nan (+nanz)| lr 3.00e-04 | 37.00 ms | "
        "9.1% bf16 MFU | 112126 tok/s\n",
        [
            (1, {"loss": 11.0, "grad_norm": 15.5, "lr": 3e-4, "step_time": 0.0365,
                 "tokens_per_sec": 112241.0, "val_loss": 10.5}),
            (2, {"loss": math.nan, "grad_norm": math.nan, "lr": 3e-4, "step_time": 0.037,
                 "tokens_per_sec": 112126.0}),
        ],
    ),
    "modded-nanogpt": (
        "modded-nanogpt",
        "print(f'step:{step}/{total} train_loss:{loss}')\n"
        "step:0/6200 val_loss:10.8258 train_time:263ms step_avg:nanms\n"
        "step:1/6200 train_loss:10.5 train_time:300ms step_avg:150.5ms\n",
        [(0, {"val_loss": 10.8258}), (1, {"loss": 10.5, "step_time": 0.1505})],
    ),
    "torchtitan, two ranks and colours": (
        "torchtitan",
        "[rank0]:[titan] 2026-02-24 19:46:17,508 - root - INFO - \x1b[31mstep:  4  \x1b[32mloss:  "
        "7.62585  \x1b[33mgrad_norm: 26.6250  memory: 66.91GiB(37.51%)  tps: 10,050  "
        "tflops: 314.71  mfu: 13.99%\n"
        "[rank1]:[titan] 2026-02-24 19:46:17,508 - root - INFO - step:  4  loss:  7.9  "
        "grad_norm: 26.6250  memory: 66.91GiB(37.51%)  tps: 10,049\n"
        "[rank0]:[titan] 2026-02-24 19:46:19,145 - root - INFO - step:  5  loss:  7.07  "
        "memory: 512.00MiB(1.0%)  tps: 9,000\n",
        [
            (4, {"loss": 7.62585, "grad_norm": 26.625, "memory": 66.91, "tokens_per_sec": 10050.0,
                 "tflops": 314.71, "mfu": 13.99}),
            (5, {"loss": 7.07, "memory": 0.5, "tokens_per_sec": 9000.0}),
        ],
    ),
    "nanochat": (
        "nanochat",
        "step 00004/21400 (0.02%) | loss: 8.893647 | lrm: 1.00 | dt: 989.00ms | tok/sec: 529,882 | "
        "mfu: 74.13 | total time: 0.00m\n",
        [(4, {"loss": 8.893647, "lrm": 1.0, "step_time": 0.989, "tokens_per_sec": 529882.0,
              "mfu": 74.13, "total time (m)": 0.0})],
    ),
    "Megatron-LM": (
        "Megatron-LM",
        " iteration      122/  250000 | consumed samples:       124928 | elapsed time per iteration"
        " (ms): 86545.0 | learning rate: 9.150E-06 | global batch size:  1024 | lm loss: "
        "2.504220E+00 | loss scale: 4096.0 | grad norm: 0.231 | number of skipped iterations:   1 |"
        " number of nan iterations:   0 |\n"
        " validation loss at iteration 122 on validation set | lm loss value: 2.600000E+00 | "
        "lm loss PPL: 1.346374E+01 |\n"
        " iteration      123/  250000 | elapsed time per iteration (ms): 86000.0 | lm loss: "
        "2.400000E+00 | grad norm: nan | number of skipped iterations:   2 |\n",
        [
            (122, {"step_time": 86.545, "lr": 9.15e-6, "global batch size": 1024.0,
                   "loss": 2.50422, "loss_scale": 4096.0, "grad_norm": 0.231, "skipped_steps": 1.0,
                   "nan_steps": 0.0}),
            (122, {"val_loss": 2.6, "validation_lm loss PPL": 13.46374}),
            (123, {"step_time": 86.0, "loss": 2.4, "grad_norm": math.nan, "skipped_steps": 3.0}),
        ],
    ),
    "DeepSpeed": (
        "DeepSpeed",
        "***** Running training *****\nppl: 4998.3\n"
        "[2023-04-18 01:46:52,554] [INFO] [loss_scaler.py:188:update_scale] [deepspeed] OVERFLOW! "
        "Rank 0 Skipping step. Attempted loss scale: 65536, but hysteresis is 2. Reducing "
        "hysteresis to 1\n"
        "[2023-04-18 01:46:53,259] [INFO] [loss_scaler.py:181:update_scale] [deepspeed] OVERFLOW! "
        "Rank 0 Skipping step. Attempted loss scale: 65536, reducing to 32768\n"
        "[2023-04-18 01:46:59,142] [INFO] [logging.py:96:log_dist] [Rank 0] step=10, skipped=2, "
        "lr=[9.5e-06, 9.5e-06], mom=[(0.9, 0.95), (0.9, 0.95)]\n"
        "[2023-04-18 01:46:59,171] [INFO] [timer.py:199:stop] epoch=0/micro_step=10/global_step=10,"
        " RunningAvgSamplesPerSec=173.5, CurrSamplesPerSec=171.5, MemAllocated=3.96GB, "
        "MaxMemAllocated=22.95GB\n"
        "ppl: 1.0\n",
        [
            (10, {"skipped_steps": 2.0, "lr": 9.5e-6, "loss_scale": 32768.0,
                  "RunningAvgSamplesPerSec": 173.5, "tokens_per_sec": 171.5, "memory": 3.96,
                  "memory_peak": 22.95, "val_loss": 0.0}),
        ],
    ),
    "OLMo": (
        "OLMo",
        "2024-08-06 09:59:26.181 host:0  olmo.train:908  INFO    [step=1/739328,epoch=0]\n"
        "    optim/total_grad_norm=231.7\n    train/CrossEntropyLoss=12.18\n"
        "    train/Perplexity=195,153\n    throughput/total_tokens=1,048,576\n"
        "    System/Peak GPU Memory (MB)=46,911\n"
        "2024-08-06 10:00:05.520 host:0  olmo.train:908  INFO    [step=2/739328,epoch=0]\n"
        "    train/CrossEntropyLoss=11.5\n    throughput/device/tokens_per_second=26,668\n",
        [
            (1, {"grad_norm": 231.7, "loss": 12.18, "train/Perplexity": 195153.0,
                 "memory_peak": 46911 / 1024}),
            (2, {"loss": 11.5, "tokens_per_sec": 26668.0}),
        ],
    ),
    "MaxText": (
        "MaxText",
        "completed step: 9, seconds: 1.341, TFLOP/s/device: 257.9, Tokens/s/device: 36653.5, "
        "loss: 10.374\n",
        [(9, {"step_time": 1.341, "TFLOP/s/device": 257.9, "tokens_per_sec": 36653.5,
              "loss": 10.374})],
    ),
    "fairseq": (
        "lines of JSON",
        '2022-05-01 10:00:00 | INFO | train_inner | {"epoch": 1, "loss": "8.25", "ppl": "300", '
        '"wps": "1000", "num_updates": "200", "lr": "0.0005", "gnorm": "1.5"}\n',
        [(200, {"loss": 8.25, "ppl": 300.0, "tokens_per_sec": 1000.0, "lr": 5e-4,
                "grad_norm": 1.5})],
    ),
    "Hugging Face's console": (
        "printed dictionaries, rows counted as steps",
        " 10%|#   | 1/9 [00:01<00:09]\r{'loss': 1.5, 'learning_rate': 1e-05, 'epoch': 0.5}\n"
        "{'loss': '1.25', 'grad_norm': '2.0', 'epoch': '1.0'}\n"
        "{'eval_loss': 1.75, 'epoch': 1.0}\n"
        "{'train_runtime': 3.0, 'train_loss': 1.4, 'epoch': 1.0}\n",
        [(1, {"loss": 1.5, "lr": 1e-5}), (2, {"loss": 1.25, "grad_norm": 2.0}),
         (2, {"val_loss": 1.75})],
    ),
    "lines of an own form": (
        "lines with steps",
        "starting\n2024-01-01 10:00:00 INFO step 100/500 loss=0.5 lr=0.1\n"
        "INFO | step 101 | epoch 0 | loss 0.25 | grad_norm 1.5 | mem 24.90 GiB\n",
        [(100, {"loss": 0.5, "lr": 0.1}), (101, {"loss": 0.25, "grad_norm": 1.5, "memory": 24.9})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_recognized_read_and_followed(tmp_path: Path, case: str) -> None:
    format_name, text, expected = CASES[case]
    path = tmp_path / "train.log"
    path.write_text(text)
    log = open_log(path)
    found = list(log.signals())
    assert log.format == format_name
    assert [signals.step for signals in found] == [step for step, _ in expected]
    for signals, (_, wanted) in zip(found, expected, strict=True):
        assert signals.values == pytest.approx(wanted, nan_ok=True)
    news = [*log.poll().signals, *log.poll().signals]  # the last record is whole when nothing comes
    assert repr(news) == repr(found)
    if case == "nanochat":
        assert log.total_steps == 21400


LINE = "step:{}/9 train_loss:{} step_avg:1ms\n"


@pytest.mark.parametrize(
    ("text", "losses"),
    [
        # A step that is repeated is another record, a line that is printed twice is one,
        (LINE.format(1, 3.0) + LINE.format(1, 2.5), [(1, 3.0), (1, 2.5)]),
        (2 * LINE.format(1, 3.0), [(1, 3.0)]),
        # and progress bars do not hide a line.
        (" 10%|#   | 1/9\r 20%|##  | 2/9\riter 7: loss 1.5, time 2ms\n", [(7, 1.5)]),
    ],
)
def test_lines_that_come_twice_or_behind_others(
    tmp_path: Path, text: str, losses: list[tuple[int, float]]
) -> None:
    (tmp_path / "log").write_text(text)
    found = open_log(tmp_path / "log").signals()
    assert [(signals.step, signals.values["loss"]) for signals in found] == losses


@pytest.mark.parametrize(
    "text",
    [
        "It was the best of times,\nit was the worst of times,\nit was the age of wisdom.\n",
        "Step by step, we lost: 3 men.\nAt step 4 of the stairs, he fell.\n",
        "def loss(step):\n    return step * 0.5\n",
    ],
)
def test_prose_and_code_are_no_log(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(NotYetError, match="no training log that is known here"):
        open_log(tmp_path / "log")


def test_the_documentation_has_every_format_and_every_signal() -> None:
    text = (Path(__file__).parents[3] / "docs/watching.md").read_text()
    assert [known.name for known in FORMATS if f"\n| {known.name} |" not in text] == []
    assert [signal for signal in ALIASES if f"`{signal}`" not in text] == []
