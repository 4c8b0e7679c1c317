"""One rank of a two-rank training: a user's script under torchrun.

Arguments: checkpoint, server address, output folder, and the LoRA targets outside the experts, separated by commas.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import TrainingArguments

from support.ranks import end_process_group
from support.training import adapted, history, lora_config, trainer


def main() -> None:
    checkpoint, address, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    # As users' scripts do: the arguments are made first, and with them the process group.
    TrainingArguments(output_dir=str(output), use_cpu=True, report_to=[])
    targets = [name for name in sys.argv[4].split(",") if name]
    model = adapted(checkpoint, address, lora_config(target_modules=targets))
    made = trainer(model, output, per_device_train_batch_size=2)
    made.train()
    made.save_model(str(output / "adapter"))
    if os.environ["RANK"] == "0":
        (output / "history.json").write_text(json.dumps(history(made)), encoding="utf-8")
    end_process_group()


if __name__ == "__main__":
    main()
