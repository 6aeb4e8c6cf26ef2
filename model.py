"""A model's files: find, load and merge them; device, dtype and memory."""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import re
import sys
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common import (
    DTYPES,
    START_MANY,
    UserError,
    collecting_later,
    first_line,
    hash_file,
    log,
    looks_like_path,
    processes,
    read_json,
)

with collecting_later():
    import torch

# What decides a model's output; only these are downloaded and hashed. No pickled weights: loading
# them can run code, so safetensors alone are read.
TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    *TOKENIZER_FILES,
)  # fmt: skip
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# Keys of weights that no model needs: rope's frequencies and causal masks, which old files hold beside the weights.
HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$"
)
# llama.cpp's names of the ways to split text that come to GPT-2's; some cut digits apart first, which their merges do too.
SPLIT_AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2", "smollm", "starcoder", "refact", "command-r", "codeshell")
# Adapters that are read from safetensors alone and can be added to the weights. XLORA opens files that its config
# names, BOFT compiles code, prompts and prefixes change no weights.
ADAPTER_TYPES = (
    "LORA", "ADALORA", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VERA", "WAVEFT",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder on disk. For a LoRA adapter, `base` is the model that its config names.

    `gguf` names the one file that holds weights, config and tokenizer, where the model is a GGUF file.
    `place` is the flag or the file that names the model; it begins every error about it.
    """

    name: str
    folder: Path
    base: "ModelFiles | None"
    gguf: str | None = None
    place: str = ""

    def hashes(self, patterns=MODEL_FILES):
        """SHA-256 by file name, the base's under `base/`."""
        if self.gguf:
            return {self.gguf: hash_file(self.folder / self.gguf)}
        found = sorted({path for pattern in patterns for path in self.folder.glob(pattern)})
        own = {path.name: hash_file(path) for path in found}
        return own | {f"base/{name}": value for name, value in (self.base.hashes() if self.base else {}).items()}


def find_model(model_id, base_model=None):
    """The files of a model given by folder, GGUF file or hub id (then downloaded, or taken from the cache).

    base_model: what an adapter is merged into, instead of the model that its config names.
    What transformers would pass over in silence is refused here: a damaged generation config, a
    weight index that names files of another kind, an attention function fetched from the hub.
    """
    files = find_files(model_id, f"--model-id {model_id}")
    if not (files.folder / "adapter_config.json").is_file() or files.gguf:
        if base_model:
            raise UserError(f"--base-model {base_model}: goes with an adapter, and --model-id {model_id} is none")
        check_model(files)
        return files
    config = read_adapter_config(files)
    named = config.get("base_model_name_or_path")
    if base_model:
        base = find_files(base_model, f"--base-model {base_model}")
    elif named and isinstance(named, str):
        place = f"{files.folder}/adapter_config.json: its base model {named}"
        try:
            base = find_files(named, place, config.get("revision"))
        except UserError as error:
            raise UserError(f"{error}; inference.py takes the base from elsewhere with --base-model") from error
    else:
        raise UserError(
            f"{files.folder}/adapter_config.json: names no base model (base_model_name_or_path); "
            "inference.py takes one with --base-model"
        )
    if (base.folder / "adapter_config.json").is_file() and not base.gguf:
        raise UserError(
            f"{base.place}: the base of an adapter, yet an adapter itself: merge it into its own base first"
        )
    check_model(base)
    return replace(files, base=base)


def find_files(name, place, revision=None):
    """A model's files, whatever they hold. `place` is the flag or the file that names it; it begins the errors."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.exists() and not path.is_dir():
        return find_gguf(name, path, place)
    if not path.is_dir():
        if path.exists() or looks_like_path(name):
            raise UserError(f"{place}: not a model folder and no .gguf file; pass one of them, or a hub id")
        path = download_model(name, place, revision=revision)
    for other in (other for pattern in MODEL_FILES for other in path.glob(pattern)):
        if not other.is_file():
            raise UserError(f"{other}: not a plain file")
    quantized = sorted(path.glob("*.gguf"))
    if quantized and not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
        if len(quantized) > 1:
            raise UserError(f"{place}: holds {len(quantized)} GGUF files; pass one of them: {quantized[0]}")
        return find_gguf(name, quantized[0], place)
    return ModelFiles(name, path, None, place=place)


def find_gguf(name, path, place):
    """The one file of a GGUF model; raises UserError where it is none, or the package that reads it is missing."""
    from importlib.util import find_spec

    if not find_spec("gguf"):
        raise UserError(f"{place}: reading GGUF files wants the package gguf: pip install gguf")
    if not path.is_file():
        raise UserError(f"{path}: not a plain file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{place}: {path} is not a GGUF file: it does not begin with GGUF")
    return ModelFiles(name, path.parent, None, path.name, place)


def check_model(files):
    """What can be told from the configs and the headers of the weights, before anything is loaded."""
    if files.gguf:
        check_gguf(files)
        return
    folder, place = files.folder, files.place
    if not (folder / "config.json").is_file():
        raise UserError(f"{place}: not a model folder: no config.json or adapter_config.json in it")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{place}: no *.safetensors in it; other weight files can run code and are not "
            "read: save the model again with save_pretrained"
        )
    for index in folder.glob("*.safetensors.index.json"):
        for shard in read_index(index):
            if not (folder / shard).is_file():
                raise UserError(f"{index}: names {shard}, which is not there: download or copy it again")
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            check_token_ids(folder / name)
    config = read_json(folder / "config.json")
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(key)):
            raise UserError(f"{folder}/config.json: {key} names code on the hub, which is not run: remove it")
    tensors = len(weight_shapes(files))
    sections = (config, *(value for value in config.values() if isinstance(value, dict)))
    for key, layers in ((key, section.get(key)) for section in sections for key in LAYER_COUNTS):
        if isinstance(layers, (int, float)) and layers > tensors:  # transformers would make a list of them at once
            raise UserError(
                f"{folder}/config.json: {key} is {layers:.0f}, and its weights are {tensors} tensors in all"
            )


def check_token_ids(path):
    """UserError where a config names end tokens in another way than transformers', or a pad token beyond the vocabulary."""
    config = read_json(path)
    end = config.get("eos_token_id")
    ids = end if isinstance(end, list) else [] if end is None else [end]
    if any(type(token) is not int for token in ids):
        raise UserError(f"{path}: eos_token_id must be a token id, a list of them or null, it is {end!r}")
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    if type(pad) is int and type(size) is int and pad >= size:
        raise UserError(f"{path}: pad_token_id {pad} lies beyond vocab_size {size}: set it to null, it is not needed")


def read_index(path):
    """The names of the weight files that an index lists, all of them safetensors beside it."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{path}: its weight_map must name a file for each weight")
    for shard in places.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{path}: names {shard!r}; weights are read from *.safetensors beside it alone")
    return sorted(set(places.values()))


def read_adapter_config(files):
    """An adapter's config, of a type whose weights can be merged; see ADAPTER_TYPES."""
    path = files.folder / "adapter_config.json"
    config = read_json(path)
    kind = config.get("peft_type")
    if kind not in ADAPTER_TYPES:
        raise UserError(
            f"{files.place}: its peft_type {kind!r} cannot be added to the weights of a base, as is done here with "
            + ", ".join(ADAPTER_TYPES)
        )
    if config.get("megatron_config"):
        raise UserError(
            f"{path}: megatron_config makes peft import the module that megatron_core names: set it to null"
        )
    if not (files.folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{files.place}: no adapter_model.safetensors in it; other weight files are not read")
    return config


class GgufHeader(NamedTuple):
    """What a GGUF file says before its weights: the fields that are no long lists, the shapes as torch has them."""

    fields: dict
    shapes: dict


def gguf_header(files):
    path = files.folder / files.gguf
    return read_gguf_header(path.resolve(), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)  # reading takes seconds where the vocabulary is large
def read_gguf_header(path, changed):
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise UserError(f"{path}: cannot be read as a GGUF file: {first_line(error)}") from error
    return GgufHeader(fields, shapes)


def check_gguf(files):
    """UserError for what transformers would pass over in silence: scaled positions, and layers without weights."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    path = files.folder / files.gguf
    fields, shapes = gguf_header(files)
    kind = fields.get("general.architecture")
    layers = fields.get(f"{kind}.block_count")
    if not isinstance(layers, int) or layers > len(shapes):
        raise UserError(f"{path}: its header has {layers} layers, and its weights are {len(shapes)} tensors in all")
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" and kind != "gpt-oss" and fields.get(f"{kind}.rope.scaling.factor") != 1:
        raise UserError(
            f"{path}: its positions are scaled ({scaling}), which transformers does not read from GGUF files"
        )
    split = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *SPLIT_AS_GPT2}:
        log(
            f"note: {path}: transformers does not know how its tokenizer splits text ({split}) and splits as GPT-2's; "
            "some texts may get other tokens than the model was trained with"
        )


def quantization(files):
    """How the weights of a GGUF file are quantized, such as MOSTLY_Q4_1; None for other models."""
    full = files.base or files
    if not full.gguf:
        return None
    from gguf import LlamaFileType

    kind = gguf_header(full).fields.get("general.file_type")
    return LlamaFileType(kind).name if kind in list(LlamaFileType) else kind


def find_tokenizer(name, flag="--tokenizer"):
    """The files of a tokenizer alone, by folder, GGUF file or hub id: a server has the weights."""
    place, folder = f"{flag} {name}", Path(name).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return find_gguf(name, folder, place)
    folder = folder if folder.is_dir() else download_model(name, place, TOKENIZER_FILES)
    return ModelFiles(name, folder, None, place=place)


def download_model(model_id, place, patterns=MODEL_FILES, revision=None):
    """The folder of a hub's model. Without the hub what the cache holds is taken, as transformers does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(
            snapshot_download(model_id, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*")
        )
    except IncompleteSnapshotError as error:
        missing = re.search(r"missing \((.*?)\)\. ", str(error))
        log(f"note: {place}: the hub cannot be reached, and its cache lacks {missing[1] if missing else 'some files'}")
        return Path(error.snapshot_path)
    except Exception as error:  # hub, network and name errors share no base class
        raise UserError(
            f"{place}: neither a folder here nor to be had from the hub ({first_line(error)}); "
            "without the hub pass a model folder, such as demo/model"
        ) from error


def quiet_transformers():
    """No warnings and bars of its own: what matters of them is an error here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(files):
    with collecting_later():
        from transformers import AutoTokenizer

    quiet_transformers()
    has_own = files.gguf or any(files.folder.glob("tokenizer*"))
    source = files if has_own or not files.base else files.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser raises
        raise UserError(f"{source.place}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer("0")["input_ids"]:  # without its files transformers makes one that knows no text
        raise UserError(f"{source.place}: its tokenizer knows no digits; are its files there?")
    return tokenizer


def encode(tokenizer, texts):
    """The token ids of each text, an array each, a thousand texts at a time: lists of a million would fill the memory."""
    ids = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False, return_attention_mask=False)
        ids += [array("i", tokens) for tokens in batch["input_ids"]]
    return ids


def load_model(files, dtype, device):
    """The causal model on the device, an adapter merged into its base, in evaluation mode.

    What is returned has all its weights from the files, and no weight of the files is left out.
    An adapter is merged in fp32 and rounded once: added to bf16 weights most of it would be lost.
    """
    with collecting_later():
        import transformers.modeling_utils  # noqa: F401 (from_pretrained would import it)
        from transformers import AutoModelForCausalLM, GgufConfig

    quiet_transformers()
    final, full = getattr(torch, DTYPES[dtype]), files.base or files
    form = {"use_safetensors": True}
    if full.gguf:  # as plain weights, which can be saved and trained; packed ones would need kernels from the hub
        form = {"gguf_file": full.gguf, "quantization_config": GgufConfig(dequantize=True)}
    try:
        plan_model(full, 4 if files.base else final.itemsize, device)
        model, report = AutoModelForCausalLM.from_pretrained(
            full.folder,
            dtype=torch.float32 if files.base else final,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they come with the report, by name
            output_loading_info=True,
            **form,
        )
        refuse_left_out(full, report)
        if full.gguf:
            model.generation_config.eos_token_id = gguf_end_tokens(full)
        if files.base:
            model = merge_adapter(model, files)
            for (
                weight
            ) in model.parameters():  # no buffers: rounded, rope's frequencies turn too far with every position
                weight.data = weight.data.to(final)
        return model.to(device).eval()
    except UserError:
        raise
    except Exception as error:  # damaged or unfit files raise whatever their parser raises
        raise UserError(f"{files.place}: cannot be loaded: {first_line(error)}") from error


def plan_model(files, element, device):
    """Build the model without memory, on the meta device, and hold it against the weights on disk and the free memory.

    A config that asks for other sizes than the weights have is refused before anything is allocated,
    and so is a model that a machine's memory does not hold: its process would be killed without a word.
    element: bytes that a weight takes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = weight_shapes(files)
    config = AutoConfig.from_pretrained(files.folder, gguf_file=files.gguf, trust_remote_code=False)
    with torch.device("meta"), at_most_parameters(100 + 10 * len(shapes), files):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    packed = bool(getattr(config, "quantization_config", None))  # then up to eight weights are one number on disk
    for name, weight in model.state_dict().items():
        if not packed and name in shapes and tuple(weight.shape) != shapes[name]:
            raise UserError(
                f"{files.place}: its config wants {name} as {'x'.join(map(str, weight.shape))}, "
                f"its weights hold it as {'x'.join(map(str, shapes[name]))}"
            )
    weights = sum(weight.numel() for weight in model.parameters())
    held = sum(map(math.prod, shapes.values()))
    if weights > (9 if packed else 2) * held:
        raise UserError(f"{files.place}: its config asks for {weights:,} weights, its files hold {held:,}")
    if files.gguf:
        refuse_left_out_of_gguf(files, model, weights, held)
    size = (min(weights, held) if packed else weights) * element + sum(
        buffer.numel() * buffer.element_size() for buffer in model.buffers()
    )
    free = free_memory(device)
    if size > free:
        raise UserError(
            f"{files.place}: its {weights:,} weights take {size / 2**30:.3g} GiB, "
            f"and {free / 2**30:.3g} are free on {device}; a 16-bit --dtype or a smaller model need less"
        )


@contextlib.contextmanager
def at_most_parameters(most, files):
    """UserError for a model that is built of more than `most` parameters: billions of modules take hours, whatever their size."""
    count = itertools.count()

    def refuse(module, name, parameter):
        if next(count) > most:
            raise UserError(
                f"{files.place}: its config asks for more than {most} tensors, ten times what its files hold"
            )

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def weight_shapes(files):
    """The shape of every tensor on disk, by name, from the headers alone."""
    from safetensors import safe_open

    if files.gguf:
        return gguf_header(files).shapes
    index = next(files.folder.glob("*.safetensors.index.json"), None)
    shapes = {}
    for path in map(files.folder.joinpath, read_index(index)) if index else files.folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has errors of its own
            raise UserError(f"{files.place}: {path.name} is damaged: {first_line(error)}") from error
    return shapes


def refuse_left_out(files, report):
    """UserError for a weight of the model that no file holds, and for one of a file that the model has no place for."""
    unexpected = {key for key in report["unexpected_keys"] if not HARMLESS.search(key)}
    for trouble, keys in (
        ("missing keys", report["missing_keys"]),
        ("mismatched keys", report["mismatched_keys"]),
        ("keys that its config does not know", unexpected),
    ):
        if keys:
            raise UserError(f"{files.place}: {trouble} in its weights: {min(map(str, keys))} ({len(keys)} in all)")


def refuse_left_out_of_gguf(files, model, weights, held):
    """transformers drops in silence what it does not know of a GGUF file; a head may be stored though it is tied."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    fields, shapes = gguf_header(files)
    if is_gguf_arch_supported(fields["general.architecture"]):
        return  # there it reports by name
    if model.config.get_text_config().tie_word_embeddings:
        held -= math.prod(shapes.get("output.weight", (0,)))
    if weights != held:
        other = [name for name in shapes if not re.match(r"blk\.|token_embd|output", name)]
        raise UserError(
            f"{files.place}: its file holds {held:,} weights, of which transformers takes {weights:,}"
            + (f"; it does not know {', '.join(other)}" if other else "")
        )


def gguf_end_tokens(files):
    """Every token that ends a text, a turn or a message; transformers takes the first of them alone."""
    fields = gguf_header(files).fields
    ends = (fields.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))
    return sorted({int(end) for end in ends if end is not None}) or None


def positions(model):
    """How many positions a model has; without a limit, more than anyone asks for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def merge_adapter(model, files):
    """The model with the adapter added to its weights. It answers as peft's own, which is tried before and after."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    path = files.folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    resize_embeddings(model, path, shapes)
    with warnings.catch_warnings(action="ignore"):  # of missing keys too, which the check below names
        adapted = PeftModel.from_pretrained(model, files.folder, torch_device="cpu").eval()
        unexpected = adapted.load_adapter(files.folder, "default", torch_device="cpu").unexpected_keys
        missing = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - shapes.keys()
    if missing:  # peft leaves them as they begin, without effect
        raise UserError(f"{path}: missing keys that its config asks for: {min(missing)}")
    if unexpected:
        raise UserError(f"{path}: keys that its config does not know: {min(unexpected)} ({len(unexpected)} in all)")
    probe = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]))[None]
    with torch.no_grad():
        before = adapted(probe).logits
        merged = merge(adapted)
        after = merged(probe).logits
    if not torch.allclose(before, after, rtol=0, atol=1e-3 * max(1.0, before.abs().max().item()), equal_nan=True):
        raise UserError(f"{path}: merged into its base it answers otherwise than beside it, so it is not taken")
    return merged


def merge(adapted):
    """The base model of a peft model, its adapter added to the weights.

    A matrix that two layers share, such as Qwen3-0.6B's embedding and head, is copied first: what an
    adapter adds to one of them is not for the other.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))
    for layer in [module.get_base_layer() for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
        for name, weight in list(layer.named_parameters(recurse=False)):
            if uses[id(weight)] > 1:
                setattr(layer, name, torch.nn.Parameter(weight.detach().clone(), weight.requires_grad))
    with warnings.catch_warnings(action="ignore"):  # of shared matrices, which are apart now
        return adapted.merge_and_unload()


def resize_embeddings(model, path, shapes):
    """As many tokens as the adapter's own embedding has, where it brings one: tokens were added before it was trained."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {}
    for name, module in model.named_modules():
        if module in (embedding, head):
            held = [f"base_model.model.{name}.{suffix}weight" for suffix in ("", "base_layer.", "modules_to_save.")]
            rows[module] = next((shapes[key][0] for key in held if key in shapes), None)
    wanted, size = rows.get(embedding) or rows.get(head), embedding.weight.shape[0]
    if not wanted or wanted == size:
        return
    tied = head is None or head.weight is embedding.weight
    if not tied and None in rows.values():
        raise UserError(f"{path}: has {wanted} tokens, its base {size}, and it brings one of embedding and head alone")
    with warnings.catch_warnings(action="ignore"):
        model.resize_token_embeddings(wanted, mean_resizing=False)  # what is added comes from the adapter


def choose_device(device, note=log):
    """The named device, or the accelerator that torch finds: CUDA, Apple's MPS, Intel's XPU; else the CPU."""
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
        if processes() > 1:
            if "LOCAL_RANK" not in os.environ:
                raise UserError(f"LOCAL_RANK is not set, so which {device} device is this process's? {START_MANY}")
            device = f"{device}:{os.environ['LOCAL_RANK']}"
        note(f"device {device}: {device_name(torch.device(device))}")
    elif device is None:
        device = "cpu"
        note(f"device {device}: no accelerator here that torch knows")
    try:
        torch.zeros(1, device=device).item()  # read back, which a device without memory cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: cannot be used here: {first_line(error)}") from error
    return torch.device(device)


def device_name(device):
    """What the maker calls the device, where torch tells."""
    import platform

    ask = getattr(torch.get_device_module(device), "get_device_name", None) if device.type != "cpu" else None
    return ask(device) if ask else platform.processor() or platform.machine()


def choose_dtype(dtype: str | None, device: torch.device, note=log) -> str:
    """The named precision, or bf16 on CUDA and fp32 elsewhere. On a CPU the note says what both reach here."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several wait for one another where other programs use the processor
        rates = {name: product_rate(name) for name in ("fp32", "bf16")}
        torch.set_num_threads(threads)
        note_rates(dtype, rates, note)
        return dtype or "fp32"
    if dtype is None:
        dtype = "bf16" if device.type == "cuda" else "fp32"
        reason = "half the memory traffic of fp32" if dtype == "bf16" else "exact"
        note(f"dtype {dtype}: the default on {device.type}, {reason}")
    return dtype


FASTER = 1.5  # how many times as fast a precision must be to be worth a line


def note_rates(dtype: str | None, rates: dict[str, float], note) -> None:
    """One line about a precision on a CPU: what the default reaches, or how much slower the one asked for is."""
    measured = f"a thread's matrix products reach {rates['fp32']:.3g} GFLOP/s in fp32, {rates['bf16']:.3g} in bf16"
    if dtype is None:
        advice = "; --dtype bf16 is faster and rounds" if rates["bf16"] > FASTER * rates["fp32"] else ""
        note(f"dtype fp32: the default on cpu, exact; {measured}{advice}")
    elif dtype == "bf16" and rates["fp32"] > FASTER * rates["bf16"]:
        slower = rates["fp32"] / rates["bf16"]
        note(f"--dtype bf16: {slower:.2g} times slower than fp32 on this processor ({measured}); pass --dtype fp32")


def product_rate(dtype: str) -> float:
    """GFLOP/s of a small matrix product on this CPU, by a measurement of a tenth of a second or less.

    It is the shape of a decode step of a small model: 64 sequences, 512 in, 512 out. Processors without
    instructions for bf16 take a tenth of a second for one, others do hundreds.
    """
    left, right = (torch.ones(count, 512, dtype=getattr(torch, DTYPES[dtype])) for count in (64, 512))
    left[:1] @ right  # the first call sets the library up
    seconds = []
    while not seconds or (sum(seconds) < 0.05 and len(seconds) < 100):
        begun = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - begun)
    return 2 * left.numel() * right.shape[1] / min(seconds) / 1e9  # the fastest, for others may use the processor


def free_memory(device):
    """Bytes that are free on the device: its own memory where it has some, else the machine's, which MPS shares."""
    import psutil

    if device.type in ("cpu", "mps"):  # all processes on the machine share it
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.accelerator.empty_cache()  # what torch keeps for itself is free too
    return torch.accelerator.get_memory_info(device)[0]


TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # as malloc.h names them
DEFAULT_MMAP_MAX = 65536


@functools.cache
def mallopt() -> Callable[[int, int], int]:
    """glibc's function of this name. With another C library, one that does nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            return ctypes.CDLL(None).mallopt
    return lambda parameter, value: 0


@functools.cache
def keep_freed_memory():
    """Keep up to a GiB that was freed, where the C library is glibc: activations come and go in every layer.

    It gives memory back as soon as it can, and takes it again page by page. That took a sixth of the time of
    generation on a CPU. Blocks above 32 MiB, such as a cohort's keys, go back as ever.
    """
    mallopt()(MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes
    mallopt()(TRIM_THRESHOLD, 2**30)


@contextlib.contextmanager
def large_blocks_kept():
    """Keep blocks of any size that are allocated meanwhile and freed later: the logits of many sequences are large.

    Taking them page by page in every step made the head's product a third slower.
    """
    mallopt()(MMAP_MAX, 0)
    try:
        yield
    finally:
        mallopt()(MMAP_MAX, DEFAULT_MMAP_MAX)


def is_out_of_memory(error):
    told = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)
