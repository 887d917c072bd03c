"""Models of which a part was decomposed by itself, saved plainly and loaded by their libraries."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers as hf

import tdecomp
import tdecomp.integrations.diffusers
import tdecomp.integrations.transformers
from tests.zoo import of_diffusers
from tests.zoo.of_transformers import MODELS
from tests.zoo.test_pretrained import KEY, assert_same

pytestmark = pytest.mark.slow


def decompose(model, path, *, inplace, **options):
    """Decompose the module at a path by itself."""
    part = model.get_submodule(path)
    options = {"rank": 4, "progress": False, **options}
    result = tdecomp.decompose(part, ["svd", "lowrank"], inplace=inplace, **options)
    if not inplace:
        model.set_submodule(path, result.model)
        getattr(model, "tie_weights", lambda: None)()  # of whose tables it has copies


def comes_back(saved, folder):
    said = copy.deepcopy(getattr(saved.config, KEY, None))
    saved.save_pretrained(folder)
    assert getattr(saved.config, KEY, None) == said
    loaded = type(saved).from_pretrained(folder)
    assert_same(loaded, saved)
    chains = {name for name, m in saved.named_modules() if isinstance(m, tdecomp.Chain)}
    rows = json.loads((folder / "config.json").read_text())[KEY]["plan"]["rows"]
    assert {row["name"] for row in rows if row["method"]} == chains
    return loaded


# Parts that have the configuration of the whole, a copy of it, one of their own, and none.
PARTS = {
    "bert": ("bert.encoder", "bert.pooler", "classifier"),
    "t5": ("encoder", "decoder.block.0"),
    "llama": ("model.layers.1.mlp", "model.layers.0"),
    "qwen2": ("model", "lm_head"),
    "clip": ("text_model", "vision_model", "visual_projection"),
    "mixtral": ("model.layers.0", "model.layers.1.mlp"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_models_of_transformers(name, inplace, tmp_path):
    whole = MODELS[name].build()
    for at, path in enumerate(PARTS[name]):
        single = isinstance(whole.get_submodule(path), torch.nn.Linear)
        decompose(
            whole, path, inplace=inplace and not single,
            exclude=["embed_tokens"] if path == "encoder" else [],  # tied to what is not in it
        )  # fmt: skip
        comes_back(whole, tmp_path / str(at))
    base = whole.base_model
    if base is not whole:
        comes_back(base, tmp_path / "base")
    loaded = comes_back(whole, tmp_path / "whole")
    comes_back(loaded, tmp_path / "loaded")
    comes_back(copy.deepcopy(whole), tmp_path / "copy")
    comes_back(pickle.loads(pickle.dumps(whole)), tmp_path / "pickled")
    whole = tdecomp.recompose(whole)
    whole.save_pretrained(tmp_path / "recomposed")
    assert KEY not in json.loads((tmp_path / "recomposed/config.json").read_text())


@pytest.mark.parametrize("inplace", [False, True])
def test_parts_of_models_of_diffusers(inplace, tmp_path):
    unet = of_diffusers.MODELS["unet"].build()
    for path in ("mid_block", "down_blocks.0.attentions.0", "conv_out"):
        single = path == "conv_out"
        decompose(unet, path, inplace=inplace and not single)
        comes_back(unet, tmp_path / path)
    scheduler = diffusers.DDPMScheduler()
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    decompose(model, "up_blocks.1", inplace=inplace)
    diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path / "pipeline")
    assert_same(diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline").unet, model)


SAVING = """
import sys
from benchmarks.support.torchvision_import import import_torchvision
import_torchvision()
import tdecomp
from tests.zoo import of_diffusers
from tests.zoo.of_transformers import MODELS
llama, unet = MODELS["qwen2"].build(), of_diffusers.MODELS["unet"].build()
options = {"rank": 4, "progress": False}
llama.model.layers[0].mlp = tdecomp.decompose(llama.model.layers[0].mlp, "svd", **options).model
llama.save_pretrained(sys.argv[1])
unet.mid_block = tdecomp.decompose(unet.mid_block, "svd", **options).model
unet.save_pretrained(sys.argv[2])
assert "tdecomp.integrations.transformers" not in sys.modules
assert "tdecomp.integrations.diffusers" not in sys.modules
"""


def test_saving_takes_no_import(tmp_path):
    folders = [str(tmp_path / name) for name in ("llama", "unet")]
    done = subprocess.run(
        [sys.executable, "-c", SAVING, *folders], check=False, capture_output=True, text=True,
        cwd=Path(tdecomp.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    llama = hf.AutoModelForCausalLM.from_pretrained(folders[0])
    assert isinstance(llama.model.layers[0].mlp.up_proj, tdecomp.Chain)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders[1])
    assert any(isinstance(module, tdecomp.Chain) for module in unet.mid_block.modules())


def test_resized_vocabulary_and_stages_of_other_sizes(tmp_path):
    whole = MODELS["llama"].build()
    result = tdecomp.decompose(whole, "svd", rank=4, progress=False)
    model = result.model
    for size in (104, 88):
        model.resize_token_embeddings(size, mean_resizing=False)
        comes_back(comes_back(model, tmp_path / str(size)), tmp_path / "again")
    model.model.layers[0].mlp.up_proj[0] = torch.nn.Linear(64, 3, bias=False)
    for saved in (model, result):
        with pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.up_proj.*0\.weight is \(3, 64\), expected \(4, 64\)"
        ):
            saved.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
