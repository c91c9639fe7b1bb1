"""A checkpoint's own chat template decides; nothing of its shape but a whole released one does, and all is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from phi3_jax.data.chat import ROLES
from phi3_jax.errors import UserError
from phi3_jax.family import proxy, published
from phi3_jax.interop.templates import JINJA, template_of

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers"


def _brings(folder: Path, **config: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ROLES)
def test_a_checkpoint_names_its_template_by_what_it_says(name, tmp_path):
    """Whatever the model is: other spellings, other places, one of several."""
    model, text = published("small"), JINJA[name].replace("message", "m").replace("'<|endoftext|>'", "eos_token")
    text = text.replace("in ms", "in messages").replace("ms[-1]", "messages[-1]")
    found = template_of(_brings(tmp_path, chat_template=text, eos_token={"content": "<|endoftext|>"}), model)
    assert found.name == name and f"{tmp_path}/tokenizer_config.json" in found.why
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": text}]
    _brings(tmp_path, chat_template=several, eos_token="<|endoftext|>")
    assert template_of(tmp_path, model).name == name
    (tmp_path / "chat_template.jinja").write_text(JINJA["moe"])
    assert template_of(tmp_path, model).name == "moe"


def test_a_checkpoint_without_one_has_that_of_its_shape_and_no_other(tmp_path):
    medium = published("medium", "128k")
    assert template_of(None, medium).name == template_of(tmp_path, medium).name == "medium"
    assert "phi-3-medium's, of its shape" in template_of(tmp_path, medium).why
    assert template_of(None, proxy("small", "pico", "family")).name == "small"
    # Grouped heads alone made it medium once, and equal ones mini.
    for other in (dataclasses.replace(medium, layers=39), dataclasses.replace(published("mini"), mlp=8000)):
        with pytest.raises(UserError, match="its shape is no released model's; give its tokenizer_config.json"):
            template_of(tmp_path, dataclasses.replace(other, name="cousin"))
    with pytest.raises(UserError, match="mini-small-clean-pico brings no chat template"):
        template_of(None, proxy("mini-small"))


@pytest.mark.parametrize(
    "text",
    ["own", "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}", "{{ bos_token }}" + JINJA["mini"],
     "{% for", "{{ 1 / 0 }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"],
)  # fmt: skip
def test_a_template_that_is_none_of_ours_is_refused(text, tmp_path):
    with pytest.raises(UserError, match="tokenizer_config.json is none of mini, small, medium, moe"):
        template_of(_brings(tmp_path, chat_template=text, bos_token="<s>"), published("mini"))


@pytest.mark.parametrize("member", ["mini", "medium"])
def test_released_files_name_their_own_template(member):
    if not (folder := SHARED / f"phi-3-{member}").is_dir():
        pytest.skip("needs the released tokenizer files")
    assert template_of(folder, published("small")).name == member
