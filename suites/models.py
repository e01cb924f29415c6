"""Models and tokenizers: a local folder or the hub by the same from_pretrained, or a mere shape."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from suites.hub import whereabouts
from suites.shapes import SHAPES
from suites.sources import ModelSource
from suites.values import short_hash

#: The format of Tulu's models (github.com/allenai/open-instruct), for tokenizers without a chat
#: template of their own. A BOS comes from the tokenizer.
TULU_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or message['role'] != 'assistant' %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def load_model(source: ModelSource, device: str) -> PreTrainedModel:
    """The causal language model of `source` in its dtype, on `device`, in evaluation mode.

    Made ready to be trained: it keeps no cache of keys and values in its forward pass. Raises
    ValueError if there is no such model, see `suites.hub.whereabouts`.
    """
    if source.shape_only:
        model = random_model(source, device)
    else:
        options = {**_weights(source), **_place(source)}
        if source.quantize:  # from_pretrained quantises where the weights shall lie
            options["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, **options
        )
        _keep_exact(model)
        if not source.quantize:
            model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the self
    # generate() asks for its own cache; the Trainer would hold one for nothing.
    model.config.use_cache = False
    return model.eval()


def weights_hash(model: torch.nn.Module) -> str:
    """Of names, shapes, dtypes and values of all parameters: tells two versions of a model apart.

    By torch's XOR of values and their sum of squares, as a cryptographic hash of billions of
    weights takes a minute.
    """

    def values_of(weight: torch.Tensor) -> tuple[int, float]:
        if weight.is_floating_point() and weight.element_size() == 1:  # float8 has no arithmetic
            weight = weight.view(torch.uint8)
        if not weight.numel():
            return 0, 0.0
        spread = float(torch.linalg.vector_norm(weight.float()))
        return int(torch.hash_tensor(weight).view(torch.int64)), float(f"{spread:.4g}")

    return short_hash(
        [
            (name, tuple(weight.shape), str(weight.dtype), values_of(weight.detach()))
            for name, weight in model.named_parameters()
        ]
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model, able to pad and to write conversations.

    It pads with EOS where it has no padding token, and gets Tulu's chat template where it has
    none. None for one of `suites.shapes`, which has no tokenizer.
    """
    if source.shape_only and source.path in SHAPES:
        return None
    options = {"trust_remote_code": source.trust_remote_code, **_place(source)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **options)
    except ImportError:
        raise
    except Exception as error:  # of many classes, whose first lines do not say of what
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{source.path} has no tokenizer that transformers can load, as tokenizer.json and "
            f"tokenizer_config.json: {first}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source.path} has no EOS token, which ends an example")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = TULU_TEMPLATE
    return tokenizer


def random_model(source: ModelSource, device: str) -> PreTrainedModel:
    """A model of `source`'s shape with random weights, made in their dtype on `device`.

    No weight is ever held in another dtype or place, but for one at a time that is quantised.
    """
    options = _weights(source)
    model = empty_model(source)
    if source.quantize:
        model = _empty_4bit(model, options["quantization_config"])
    _fill(model, model.config.initializer_range, device)
    _keep_exact(model)
    return model


def empty_model(source: ModelSource, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """The model of `source`, or of `config` in its place, with its weights on the meta device:
    shapes without values, in no time.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config_of(source) if config is None else config,
            dtype=getattr(torch, source.dtype),
            trust_remote_code=source.trust_remote_code,
        )
    model.tie_weights()
    return model


def config_of(source: ModelSource) -> PretrainedConfig:
    """The shape of the model of `source`; no weight is read."""
    if source.path in SHAPES:
        return LlamaConfig(**SHAPES[source.path])
    return AutoConfig.from_pretrained(
        source.path, trust_remote_code=source.trust_remote_code, **_place(source)
    )


def _place(source: ModelSource) -> dict[str, Any]:
    """The options of from_pretrained that say where the files are."""
    revision = {} if source.revision is None else {"revision": source.revision}
    return {**whereabouts(source.path), **revision}


def _weights(source: ModelSource) -> dict[str, Any]:
    """The options of from_pretrained that say how weights are held."""
    dtype = getattr(torch, source.dtype)
    if source.quantize is None:
        return {"dtype": dtype}
    if find_spec("bitsandbytes") is None:
        raise ValueError("4-bit weights need bitsandbytes; install the extra `quantized`")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"dtype": dtype, "quantization_config": quantization}


def _keep_exact(model: PreTrainedModel) -> None:
    """Forbids bitsandbytes to repack 4-bit weights for a CPU's own bfloat16 instructions.

    It would do so in place and with loss, in the first evaluation; training after it is wrong.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, flag):
            setattr(module, flag, False)


def _empty_4bit(model: PreTrainedModel, quantization: Any) -> PreTrainedModel:
    """`model`, its weights on the meta device, with the layers that from_pretrained would give."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers import AutoHfQuantizer

    head = [name for name, module in model.named_modules() if module is model.lm_head]
    model = replace_with_bnb_linear(model, head, quantization)
    for flag in ("is_loaded_in_4bit", "is_quantized"):
        setattr(model, flag, True)
    model.config.quantization_config = quantization
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
    return model


def _fill(model: PreTrainedModel, spread: float, device: str) -> None:
    """Puts random values (of standard deviation `spread`) where `model` has none yet."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # tied weights are one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = _random(module, parameter, spread, device)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _random(
    module: torch.nn.Module, parameter: torch.nn.Parameter, spread: float, device: str
) -> torch.nn.Parameter:
    # A Linear4bit is made without its dtype, and has no quantised form on the meta device.
    shape, dtype = parameter.shape, getattr(module, "compute_dtype", parameter.dtype)
    is_packed = hasattr(module, "quant_state") and parameter is module.weight
    if is_packed and isinstance(module, torch.nn.Linear):
        shape = torch.Size((module.out_features, module.in_features))
    values = torch.empty(shape, dtype=dtype, device=device)
    if len(shape) == 1:
        values.fill_(0.0 if parameter is getattr(module, "bias", None) else 1.0)
    else:
        values.normal_(0.0, spread)
    if is_packed:
        from bitsandbytes.nn import Params4bit

        packed = Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True)
        return packed.to(device)  # type: ignore[misc]  # it says that it moves Modules
    return torch.nn.Parameter(values)
