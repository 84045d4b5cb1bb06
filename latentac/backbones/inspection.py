"""A pipeline's folder, judged by its JSON and by the headers of its weights, before anything large is loaded.

Everything that a later step would refuse, or would use in another way than the model was trained, is found here, all
of it together, with the remedy.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentac.backbones.bounds import beyond, unheld
from latentac.backbones.layout import ADAPTER, INDEX, Layout, Part, Rule, unreadable
from latentac.backbones.vocabulary import SENTENCEPIECE, read_tokenizer
from latentac.backbones.weights import Weights, shapes
from latentac.system.errors import ConfigError, Problem
from latentac.system.modelfiles import ADAPTERS, Damaged, faults, read_json, shorten

SUPPORTED = (
    "Supported: Stable Diffusion 1.x and 2.x (StableDiffusionPipeline, backbone.use=unet), Stable Diffusion XL "
    "(StableDiffusionXLPipeline, backbone.use=sdxl), Stable Diffusion 3 and 3.5 (StableDiffusion3Pipeline, "
    "backbone.use=dit), FLUX.1 (FluxPipeline, backbone.use=flux), Z-Image (ZImagePipeline, backbone.use=zimage)"
)
_BACKBONES = {
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "dit",
    "FluxPipeline": "flux",
    "ZImagePipeline": "zimage",
}
_KNOWN_PIPELINES = {
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL",
    "StableDiffusionXLInpaintPipeline": "inpainting with Stable Diffusion XL",
    "StableDiffusionInpaintPipeline": "an inpainting model",
    "StableDiffusionInpaintPipelineLegacy": "an inpainting model",
    "StableDiffusionImg2ImgPipeline": "an image-to-image pipeline",
    "StableDiffusionInstructPix2PixPipeline": "instruct-pix2pix, which edits an image",
    "StableDiffusionDepth2ImgPipeline": "a depth-to-image model",
    "StableDiffusionUpscalePipeline": "an upscaler",
    "StableDiffusionLatentUpscalePipeline": "an upscaler",
    "StableDiffusionControlNetPipeline": "a pipeline with a ControlNet",
    "StableDiffusionAdapterPipeline": "a pipeline with a T2I adapter",
    "StableDiffusionGLIGENPipeline": "GLIGEN, which takes boxes",
    "StableDiffusionImageVariationPipeline": "a model that takes an image and no text",
    "StableUnCLIPPipeline": "unCLIP",
    "StableUnCLIPImg2ImgPipeline": "unCLIP",
    "LatentConsistencyModelPipeline": "a latent consistency model, guidance-distilled",
    "AltDiffusionPipeline": "AltDiffusion, with an XLM-Roberta text encoder",
    "StableDiffusion3Img2ImgPipeline": "an image-to-image pipeline",
    "StableDiffusion3InpaintPipeline": "an inpainting pipeline",
    "StableDiffusion3ControlNetPipeline": "a pipeline with a ControlNet",
    "FluxFillPipeline": "inpainting with FLUX.1",
    "FluxKontextPipeline": "FLUX.1 Kontext, which edits an image",
    "FluxControlPipeline": "FLUX.1 with a control image",
    "FluxControlNetPipeline": "a pipeline with a ControlNet",
    "FluxImg2ImgPipeline": "an image-to-image pipeline",
    "FluxInpaintPipeline": "an inpainting pipeline",
    "Flux2Pipeline": "FLUX.2",
    "PixArtAlphaPipeline": "PixArt",
    "PixArtSigmaPipeline": "PixArt",
    "SanaPipeline": "Sana",
    "AuraFlowPipeline": "AuraFlow",
    "LuminaPipeline": "Lumina",
    "HunyuanDiTPipeline": "Hunyuan-DiT",
    "KandinskyPipeline": "Kandinsky",
    "WuerstchenCombinedPipeline": "Würstchen",
    "StableCascadeCombinedPipeline": "Stable Cascade",
    "QwenImagePipeline": "Qwen-Image",
    "ZImageImg2ImgPipeline": "an image-to-image pipeline",
    "ZImageInpaintPipeline": "an inpainting pipeline",
    "ZImageControlNetPipeline": "a pipeline with a ControlNet",
    "ZImageOmniPipeline": "Z-Image-Omni, which takes images beside the text",
    "DiTPipeline": "DiT, which takes classes and no text",
    "DDPMPipeline": "a model without text",
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")
_MOST_NAMED = 5  # numbers of a file that are out of bounds; more help nobody
_WHOLE_MODELS = {"clip": "CLIPModel", "t5": "T5ForConditionalGeneration", "qwen3": "Qwen3ForCausalLM"}
"""Of which the text encoder may be a part."""
_SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def inspect(source: str, folder: Path, layout: Layout, *, weights: bool = True) -> list[Problem]:
    """Every problem of the pipeline in `folder`, reported under `backbone.source` = `source`; none if it can be used.

    weights: False while only the configurations were fetched.
    """
    problems = [_problem(source, *each) for each in unreadable(folder, layout)]
    if problems:
        return problems
    found = list(_pipeline(source, folder, layout))
    if found:  # the parts of another pipeline would only add noise
        return [_problem(source, INDEX, *each) for each in found]
    index = read_json(folder / INDEX)
    configurations: dict[str, dict[str, Any]] = {}
    failed: set[str] = set()
    for part in layout.parts:
        faults = list(_part(folder, part, index.get(part.name), configurations, network=part.name == layout.network))
        failed |= {part.name} if faults else set()
        if not faults and weights and part.stem is not None:
            faults = list(_weights(folder, part, configurations[part.name]))
        problems += [_problem(source, part.name, *each) for each in faults]
    for parts, rule in layout.rules:
        if configurations.keys() >= set(parts):
            problems += _ruled(source, rule, configurations)
    if "scheduler" not in failed:
        problems += _scheduler(source, folder, layout)
    return problems


def inspect_alone(folder: Path, parts: Sequence[Part], *, weights: bool = True) -> Iterator[tuple[str, str, str]]:
    """The same of parts that lie in `folder` itself, in no pipeline: which part, what is wrong, the remedy."""
    configurations: dict[str, dict[str, Any]] = {}
    names = [path.name for path in folder.glob("[!.]*")]
    refused = list(faults(folder, {name for part in parts for name in part.files(names)}))
    refused += [(name, *ADAPTER) for name in sorted({*names} & {*ADAPTERS})]
    yield from refused
    for part in () if refused else parts:
        found = list(_part(folder, part, [part.library, part.classes[0]], configurations, network=False))
        if not found and weights and part.stem is not None:
            found = list(_weights(folder, part, configurations[part.name]))
        for problem, remedy in found:
            own = f"Supported: {' or '.join(part.classes)} of {part.library}" if remedy == SUPPORTED else remedy
            yield part.label, shorten(problem), own


def _ruled(source: str, rule: Rule, configurations: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    try:
        return [_problem(source, *each) for each in rule(configurations)]
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        return [_problem(source, "config.json", f"has values of the wrong type ({error})", "Fetch the file again")]


def weights_of(folder: Path, part: Part) -> Weights | None:
    """The files that a part of the pipeline in `folder` is loaded from."""
    return part.weights([path.name for path in (folder / part.name).glob("*") if path.is_file()])


def conversion(file: str) -> str:
    """What makes a folder of a single-file checkpoint."""
    return (
        'Convert it: python -c "from diffusers import StableDiffusionPipeline as P; '
        f"P.from_single_file({file!r}, safety_checker=None).save_pretrained('converted')\" "
        "(StableDiffusionXLPipeline for XL, StableDiffusion3Pipeline for 3.x), then backbone.source=converted"
    )


def _pipeline(source: str, folder: Path, layout: Layout) -> Iterator[tuple[str, str]]:
    """What is wrong with model_index.json."""
    if not (folder / INDEX).is_file():
        single = sorted(path.name for path in folder.glob("*") if path.suffix in _SINGLE)
        if single:
            yield f"is missing, and beside it lies the single file {single[0]}", conversion(str(folder / single[0]))
        elif (folder / "config.json").is_file():
            yield "is missing: this is one part of a pipeline", "Name the folder of the whole pipeline"
        else:
            yield "is missing, so this is not a diffusers pipeline", SUPPORTED
        return
    try:
        name = read_json(folder / INDEX).get("_class_name")
    except (Damaged, OSError) as error:
        yield str(error), _remedy(str(error))
        return
    if name == layout.pipeline:
        return
    if str(name) in _BACKBONES:
        yield f"says {name}, which is another backbone's", f"Set backbone.use={_BACKBONES[str(name)]}"
    else:
        known = _KNOWN_PIPELINES.get(str(name))
        yield f"says {name}{f': {known}' if known else ''}, which is not supported", SUPPORTED


def _part(
    folder: Path, part: Part, entry: object, configurations: dict[str, dict[str, Any]], *, network: bool
) -> Iterator[tuple[str, str]]:
    """What is wrong with a part before its weights; its configuration goes into `configurations`."""
    declared = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    expected = " or ".join(part.classes)
    if declared is None:
        yield f"is null or missing in {INDEX}", f"Use a complete pipeline: this one needs {expected or 'a scheduler'}"
        return
    if part.classes and declared not in part.classes:
        yield f"is a {declared} in {INDEX}, and only {expected} is supported", SUPPORTED
        return
    if isinstance(entry, list) and entry[0] != part.library:
        yield (
            f"is of {entry[0]!r} in {INDEX}, which is not {part.library}",
            f"Write {part.library!r}: no other is loaded",
        )
        return
    if not (folder / part.name).is_dir():
        yield "is missing", "Fetch the whole pipeline"
        return
    try:
        if part.kind == "tokenizer":
            configurations[part.name] = read_tokenizer(folder / part.name, part.model_type)
            return
        file = str(part.configuration)
        described = read_json(folder / part.name / file) if (folder / part.name / file).is_file() else {}
        wrong = [f"{file}: {fault}" for fault in beyond(described, network=network)]
        if not wrong and part.kind != "scheduler":
            configurations[part.name] = _configuration(folder / part.name, part)
    except (Damaged, OSError) as error:
        yield str(error), _remedy(str(error))
        return
    for fault in wrong[:_MOST_NAMED]:
        yield fault, "Write the number that the model was trained with"


def _configuration(folder: Path, part: Part) -> dict[str, Any]:
    """A network's config.json. Raises Damaged."""
    if not (folder / "config.json").is_file():
        raise Damaged("has no config.json")
    found = read_json(folder / "config.json")
    architectures = found.get("architectures")
    named = found.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    fitting = {*part.classes, *((_WHOLE_MODELS[part.model_type],) if part.kind == "text_encoder" else ())}
    if named is not None and str(named) not in fitting:
        raise Damaged(f"config.json says {named}, and only {' or '.join(part.classes)} is supported")
    if part.kind == "text_encoder":
        kind = str(found.get("model_type", part.model_type))
        if not kind.startswith(part.model_type):
            raise Damaged(f"config.json says model_type {kind!r}, and only {part.model_type.upper()} is supported")
    if "text_config" in found and part.kind == "text_encoder" and part.model_type != "clip":
        raise Damaged("config.json has a text_config, which only CLIP's has: it would be checked, and not be read")
    if "quantization_config" in found:
        raise Damaged("config.json has a quantization_config: quantised weights cannot be trained")
    return found


def _weights(folder: Path, part: Part, configuration: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the weight files of a part."""
    chosen = weights_of(folder, part)
    if chosen is not None:
        own = configuration.get("text_config")  # of CLIP's whole, whose other half is not loaded
        try:
            held = shapes(folder / part.name, chosen)
        except (Damaged, OSError) as error:
            yield str(error), _remedy(str(error))
            return
        for fault in [*unheld(own if isinstance(own, dict) else configuration, held)][:_MOST_NAMED]:
            yield f"config.json: {fault}", f"Use the weights that belong to {part.name}/config.json"
        return
    others = sorted(path.name for path in (folder / part.name).glob("*") if path.suffix in _PICKLES)
    misnamed = sorted(path.name for path in (folder / part.name).glob("*.safetensors"))
    if misnamed:
        yield f"has no {part.stem}.safetensors, but {misnamed[0]}", f"Rename it to {part.stem}.safetensors"
    elif others:
        library = "diffusers" if part.stem != "model" else "transformers"
        remedy = (
            f'Convert what you trust: python -c "from {library} import {part.classes[0]} as M; '
            f"M.from_pretrained({str(folder / part.name)!r}, use_safetensors=False)"
            f'.save_pretrained({str(folder / part.name)!r})"'
        )
        yield f"has no safetensors weights, but {others[0]}: pickles can run code and are never loaded", remedy
    else:
        yield "has no weights", "Fetch the whole pipeline"


def _scheduler(source: str, folder: Path, layout: Layout) -> Sequence[Problem]:
    from latentac.backbones import schedulers  # loads diffusers: after all that can be refused without

    try:
        if layout.network == "unet":
            schedulers.variance_preserving(folder, source)
        else:
            schedulers.flow_shift(folder, 1, source)
    except ConfigError as error:
        return error.problems
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        problem = f"has values of the wrong type ({error})"
        return [_problem(source, schedulers.FILE, problem, "Fetch the file again")]
    return ()


def _remedy(problem: str) -> str:
    if "git-lfs" in problem:
        return "Run `git lfs pull` in its folder"
    if SENTENCEPIECE in problem:
        return "Where sentencepiece is installed, load it with T5TokenizerFast and call save_pretrained"
    if "merges.txt, but" in problem:
        return "Put vocab.json and merges.txt of the published model's tokenizer beside it"
    if "quantised" in problem:
        return "Use the model in float32, float16 or bfloat16"
    if "supported" in problem:
        return SUPPORTED
    return "Fetch the file again"


def _problem(source: str, where: str, problem: str, remedy: str) -> Problem:
    return Problem("backbone.source", source, f"{where}: {shorten(problem)}", remedy)
