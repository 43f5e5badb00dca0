"""Which of other libraries' tests are run, and where their source distributions are unpacked."""

import subprocess
import sys
import tarfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".peers"  # git ignores it
HUB = CACHE / "hub"

# 20 families of timm's that are vision transformers, or nearly, each in its smallest size.
TIMM = (
    "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vit_relpos_small_patch16_224",
    "vit_wee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_little_patch16_reg1_gap_256",
    "flexivit_small",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "eva02_tiny_patch14_224",
    "mixer_s32_224",
    "pit_ti_224",
    "crossvit_tiny_240",
    "convit_tiny",
    "hiera_tiny_224",
    "swin_tiny_patch4_window7_224",
)


@dataclass(frozen=True)
class Suite:
    """A part of a library's tests."""

    name: str
    library: str
    tests: str  # a file: of the distribution, or of ours where it begins with "/"
    keyword: str  # as for `pytest -k`
    layers: str | None = None  # for `transform`: where there is no pattern, and too few layers to find them by likeness
    train: bool = False  # whether loaded models are in training mode, where `from_pretrained` leaves them in eval mode

    @property
    def folder(self) -> Path:
        return CACHE / f"{self.library}-{version(self.library)}"


def _transformers(*families: str, layers: str | None = None) -> list[Suite]:
    ours = str(HERE / "transformers_models.py")
    return [Suite(family.lower(), "transformers", ours, family, layers) for family in families]


def _timm() -> Suite:
    names = " or ".join(f"-{name}] or [{name}]" for name in TIMM)
    return Suite("timm", "timm", "tests/test_models.py", f"({names}) and not prune_intermediate_layers_contract")


def _peft(name: str, keyword: str, train: bool = False) -> Suite:
    return Suite(name, "peft", "tests/test_decoder_models.py", keyword, train=train)


SUITES = [
    *_transformers("Llama", "GPT2", "Bert", "ViT"),
    *_transformers("Mixtral", layers=r"(model\.)?layers\.\d+"),
    *_transformers("T5", layers=r".*coder\.block\.1"),  # block 0 makes the position bias, and cannot be routed
    *_transformers("Bart", "Whisper", layers=r".*coder\.layers\.\d+"),
    _timm(),
    _peft("peft", "Llama and (LoraConfig or IA3 or Prefix or Prompt) and not training or not internal-testing"),
    _peft("peft-training", "training and (Llama or GPT2LMHead)", train=True),
]


def unpack(suite: Suite) -> None:
    """Download the source distribution of the installed version, once."""
    if suite.folder.exists():
        return
    CACHE.mkdir(exist_ok=True)
    wanted = f"{suite.library}=={version(suite.library)}"
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(CACHE)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
    with tarfile.open(CACHE / f"{suite.folder.name}.tar.gz") as archive:
        archive.extractall(CACHE, filter="data")
    (suite.folder / "tests" / "__init__.py").touch()  # distributions leave it out, and tests import from each other
    if suite.library == "peft":
        from .hub import fill

        fill(HUB)
