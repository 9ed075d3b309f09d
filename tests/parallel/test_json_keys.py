"""The table of the DeepSpeed JSON's keys against the installed DeepSpeed, and what every key does with its values."""

import ast
import copy
import inspect

import pytest
from deepspeed import __version__
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.runtime import config as upstream
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel

from eve_ds.config import ConfigError, parse_config
from eve_ds.parallel.deepspeed_json.keys import CHECKED, FOLLOWED, KEYS, NOTED, REFUSED, TAKEN, UNUSED, WHOLE, Rule
from eve_ds.parallel.settings import resolve_deepspeed_config


class Recorder(dict):
    """Dictionary that records the keys that are asked of it, whether it has them or not."""

    def __init__(self, **values):
        super().__init__(**values)
        self.asked = set(values)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        return self


PLAIN_SECTIONS = {
    "activation_checkpointing": Recorder(),
    "aio": Recorder(),
    "autotuning": Recorder(model_info=Recorder()),
    "checkpoint": Recorder(writer=Recorder(), parallel_write=Recorder()),
    "data_efficiency": Recorder(),
    "data_types": Recorder(),
    "expert_parallel": Recorder(enabled=False),
    "flops_profiler": Recorder(),
    "timers": Recorder(throughput={}),
    "torch_autocast": Recorder(dtype="bf16", lower_precision_safe_modules=[]),
}
"""Sections that DeepSpeed reads key by key."""
OF_INITIALIZE = {"sequence_parallel_size", "data_parallel_size"}
"""Keys that `deepspeed.initialize` reads itself, from the dictionary that it gets."""


@pytest.fixture(scope="module")
def document():
    """A recorder that DeepSpeed has read as its configuration."""
    sections = {name: copy.copy(section) for name, section in PLAIN_SECTIONS.items()}
    document = Recorder(train_batch_size=1, **sections)
    upstream.DeepSpeedConfig(document)
    parse_autoep_config(sections["expert_parallel"])
    return document


def names(section):
    return {key for key in section if key != WHOLE}


def test_table_follows_the_installed_version():
    assert __version__.partition("+")[0] == FOLLOWED


def test_top_level_has_exactly_the_keys_that_deepspeed_reads(document):
    known = document.asked | set(upstream._REMOVED_TOP_LEVEL_CONFIG_KEYS) | OF_INITIALIZE
    assert names(KEYS) == known


@pytest.mark.parametrize("name", [*PLAIN_SECTIONS])
def test_plain_section_has_exactly_the_keys_that_deepspeed_reads(document, name):
    asked = document[name].asked
    assert names(KEYS[name]) == asked


@pytest.mark.parametrize("path", ["checkpoint.writer", "checkpoint.parallel_write"])
def test_nested_plain_section_has_exactly_the_keys_that_deepspeed_reads(document, path):
    section, name = path.split(".")
    assert names(KEYS[section][name]) == document[section][name].asked


def test_pipeline_has_exactly_deepspeeds_keys():
    assert names(KEYS["pipeline"]) == upstream.get_pipeline_config({}).keys()


def fields(model):
    """Name in the JSON -> annotation, of a configuration class; aliases count too."""
    found = {}
    for name, field in model.model_fields.items():
        found[name] = found[field.alias or name] = field.annotation
    return found


def nested_models(annotation):
    """Configuration classes in an annotation such as `Optional[ZenFlowConfig]`."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in getattr(annotation, "__args__", ()) for model in nested_models(part)]


def model_sections():
    """Section of the table -> configuration class, for every class that DeepSpeed's configuration is made of."""
    parsed = upstream.DeepSpeedConfig({"train_batch_size": 1, "comms_logger": {}, "weight_quantization": {}})
    roots = {
        "zero_optimization": type(parsed.zero_config),
        "bf16": type(parsed.bfloat16_config),
        "bfloat16": type(parsed.bfloat16_config),
        "fp16": type(parsed.float16_config),
        "hybrid_engine": type(parsed.hybrid_engine),
        "compile": type(parsed.compile_config),
        "tensor_parallel": type(parsed.tensor_parallel_config),
        "comms_logger": type(parsed.comms_config.comms_logger),
        "weight_quantization": type(parsed.weight_quantization_config),
        "timers.throughput": type(parsed.timers_config),
        **{
            name: type(getattr(parsed.monitor_config, name))
            for name in ("tensorboard", "csv_monitor", "wandb", "comet")
        },
    }
    found = {}
    while roots:
        path, model = roots.popitem()
        found[path] = model
        for name, annotation in fields(model).items():
            roots |= {f"{path}.{name}": inner for inner in nested_models(annotation)}
    return found


MODELS = model_sections()
REMOVED = {"zero_optimization": set(upstream._REMOVED_ZERO_CONFIG_KEYS)}


def section_at(path):
    section = KEYS
    for part in path.split("."):
        section = section[part]
    return section


@pytest.mark.parametrize("path", sorted(MODELS))
def test_section_has_exactly_the_fields_of_deepspeeds_class(path):
    assert names(section_at(path)) == fields(MODELS[path]).keys() | REMOVED.get(path, set())


def test_every_configuration_class_that_deepspeed_parses_is_compared():
    """Classes named in DeepSpeed's own parser are compared above; a new one must be added there."""
    tree = ast.parse(inspect.getsource(upstream))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    classes = {name for name in called if inspect.isclass(getattr(upstream, name, None))}
    models = {name for name in classes if issubclass(getattr(upstream, name), DeepSpeedConfigModel)}
    assert models <= {model.__name__ for model in MODELS.values()}


def rules(section=KEYS, prefix=""):
    """All rules of the table by path; of a section as a whole too."""
    found = {}
    for key, rule in section.items():
        path = f"{prefix}{key}".rstrip(".")
        found |= {path: rule} if isinstance(rule, Rule) else rules(rule, f"{path}.")
    return found


RULES = rules()
SECTIONS = ["", *sorted({path.rpartition(".")[0] for path in RULES} - {""})]


def nested(path, value):
    """{"a": {"b": value}} for the path "a.b"."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def at_stage(stage, path, value):
    """The value at a path, in a file with a ZeRO stage."""
    dictionary = nested(path, value)
    dictionary.setdefault("zero_optimization", {})["stage"] = stage
    return dictionary


def refusal(dictionary, **sections):
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed_config(dictionary, parse_config({"train": {"train_batch_size": 8}, **sections}), 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_rule_has_a_use_and_its_reason():
    for path, rule in RULES.items():
        assert rule.use in (TAKEN, CHECKED, NOTED, REFUSED, UNUSED)
        assert bool(rule.why) == (rule.use in (NOTED, REFUSED)), path
        assert rule.use != REFUSED or rule.why.rpartition(": ")[2] or rule.why.endswith("instead"), path


@pytest.mark.parametrize("section", SECTIONS)
def test_a_misspelt_key_is_refused_with_the_nearest_name_at_every_level(section):
    own = [key for key in (section_at(section) if section else KEYS) if key]
    longest = max(own, key=len)
    misspelt = longest[:3] + longest[4:] + "s"
    path = f"{section}.{misspelt}".lstrip(".")
    text = refusal(nested(path, True))
    assert f"{path} in the DeepSpeed JSON is no key of DeepSpeed {FOLLOWED}: did you mean {longest}?" in text


@pytest.mark.parametrize(
    ("dictionary", "text"),
    [
        (
            {"gradient_cliping": 1},
            "gradient_cliping in the DeepSpeed JSON is no key of DeepSpeed 0.19.8: did you mean ",
        ),
        ({"gradient_cliping": 1}, "did you mean gradient_clipping?"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean zero_optimization?"),
        ({"BF16": {"enabled": True}}, "did you mean bf16?"),
        ({"overlap_comm": True}, "it belongs at zero_optimization.overlap_comm"),
        ({"zero_optimization.stage": 1}, "it belongs at zero_optimization.stage"),
        ({"fp16": {"offload_optimizer": {}}}, "it belongs at zero_optimization.offload_optimizer"),
        ({"zero_optimization": {"offload_optimiser": {}}}, "did you mean offload_optimizer?"),
        ({"": 1}, "is no key of DeepSpeed 0.19.8: remove it"),
        ({"qqq\nzzz": 1}, "qqq zzz in the DeepSpeed JSON is no key of DeepSpeed 0.19.8: remove it"),
    ],
)
def test_unknown_keys_name_what_was_meant(dictionary, text):
    assert text in refusal(dictionary)


WRONG = {
    "bool": ["true", 1, 0, None, [], {}, 1.0],
    "whole": ["1", True, 1.5, None, [], float("nan"), float("inf"), -(10**30), 10**30],
    "number": ["1", True, None, [], float("nan"), float("inf")],
    "text": [1, True, [], {}],
    "texts": ["a", 1, [1], {"a": 1}],
    "mapping": [1, "a", [1], True],
}
"""Form of a kind -> values of other types."""


@pytest.mark.parametrize("path", [path for path, rule in RULES.items() if rule.kind.form in WRONG])
def test_values_of_another_type_are_refused_by_name_for_every_key(path):
    rule = RULES[path]
    is_whole_section = isinstance(section_at(path), dict)
    for value in WRONG[rule.kind.form]:
        if (value is None and rule.kind.null) or (is_whole_section and value is None):
            continue
        text = refusal(nested(path, value))
        assert f"{path} (" in text, (value, text)
        assert " in the DeepSpeed JSON must be " in text, (value, text)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("bf16.enabled", "true", 'bf16.enabled ("true") in the DeepSpeed JSON must be true or false, without quotes'),
        ("bf16.enabled", 1, "bf16.enabled (1) in the DeepSpeed JSON must be true or false"),
        (
            "train_micro_batch_size_per_gpu",
            True,
            "train_micro_batch_size_per_gpu (true) in the DeepSpeed JSON must be a whole number from 1 on",
        ),
        ("train_batch_size", "64", "must be a whole number from 1 on, without quotes"),
        (
            "zero_optimization.stage",
            4,
            "zero_optimization.stage (4) in the DeepSpeed JSON must be a whole number from 0",
        ),
        ("zero_optimization.stage", None, "zero_optimization.stage (null) in the DeepSpeed JSON must be a whole"),
        ("zero_optimization.allgather_bucket_size", 3, "must be a whole number divisible by 2 from 2 on"),
        ("zero_optimization.offload_optimizer.device", "gpu", 'must be one of "none", "cpu", "nvme"'),
        ("zero_optimization", True, "zero_optimization (true) in the DeepSpeed JSON must be a JSON object"),
    ],
)
def test_wrong_types_say_the_rule(path, value, text):
    assert text in refusal(nested(path, value))


def test_whole_floats_count_as_whole_numbers():
    config = parse_config({"train": {"train_batch_size": 8}, "optimizer": {"clip_grad_norm": 0}})
    sizes = {"reduce_bucket_size": 2e8, "allgather_bucket_size": 2e8}
    _, resolved = resolve_deepspeed_config({"zero_optimization": {"stage": 2, **sizes}}, config, 1)
    assert resolved["zero_optimization"] == {"stage": 2, **dict.fromkeys(sizes, 200_000_000)}
    assert all(isinstance(resolved["zero_optimization"][key], int) for key in sizes)


def outcome(dictionary):
    """What DeepSpeed would get, or the refusal."""
    dictionary.setdefault("zero_optimization", {}).setdefault("stage", 1)
    try:
        return resolve_deepspeed_config(dictionary, parse_config({"train": {"train_batch_size": 8}}), 1)[1]
    except ConfigError as error:
        return str(error).lower()


@pytest.mark.parametrize("path", [path for path, rule in RULES.items() if rule.kind.choices])
def test_a_choice_in_capitals_means_the_same(path):
    for choice in RULES[path].kind.choices:
        assert outcome(nested(path, choice.upper())) == outcome(nested(path, choice)), choice


def fitting(rule):
    """A value of the rule's kind that is not neutral."""
    kind = rule.kind
    candidates = {
        "bool": [True, False],
        "whole": [int(max(kind.low, 0)) + step * kind.multiple for step in range(4)],
        "number": [max(kind.low, 0.0) + 0.25, max(kind.low, 0.0) + 0.5],
        "text": list(kind.choices) or ["a text"],
        "texts": [["a"]],
        "numbers": [[0.5]],
        "mapping": [{"a": 1}],
        "any": [True, ["a"], {"a": 1}],
    }[kind.form]
    return next(value for value in candidates if not any(value == other for other in rule.neutral))


@pytest.mark.parametrize("path", [path for path, rule in RULES.items() if rule.use == REFUSED])
def test_refused_keys_are_refused_by_name_unless_neutral(path):
    rule, section = RULES[path], section_at(path)
    value = fitting(rule)
    if isinstance(section, dict):
        value = {next(key for key in section if key): fitting(next(rule for key, rule in section.items() if key))}
    text = refusal(at_stage(rule.stages[-1], path, value))
    assert text.startswith(f"{path} ("), text
    assert f") in the DeepSpeed JSON cannot be used: {rule.why}" in text
    for neutral in rule.neutral:
        resolve_deepspeed_config(at_stage(rule.stages[-1], path, neutral), CONFIG, 1)


CONFIG = parse_config({"train": {"train_batch_size": 8}, "optimizer": {"clip_grad_norm": 0}})


@pytest.mark.parametrize("path", [path for path, rule in RULES.items() if rule.use == NOTED])
def test_noted_keys_are_logged_by_name_and_removed(path, eve_log):
    value = fitting(RULES[path])
    _, resolved = resolve_deepspeed_config(nested(path, value), CONFIG, 1)
    assert [line for line in eve_log if line.startswith(f"{path} (")], eve_log
    _, without = resolve_deepspeed_config({}, CONFIG, 1)
    assert resolved == without


ELSEWHERE = [
    path for path, rule in RULES.items() if rule.stages != (0, 1, 2, 3) and path != "zero_optimization.cpu_offload"
]


@pytest.mark.parametrize("path", ELSEWHERE)
def test_keys_of_other_zero_stages_are_logged_by_name_and_removed(path, eve_log):
    rule = RULES[path]
    stage = next(stage for stage in (0, 1, 2) if stage not in rule.stages)
    _, resolved = resolve_deepspeed_config(at_stage(stage, path, fitting(rule)), CONFIG, 1)
    (line,) = [line for line in eve_log if line.startswith(f"{path} (")]
    assert line.endswith(f"only, and the stage is {stage}")
    assert resolved["zero_optimization"] == {"stage": stage}
    for neutral in rule.neutral:
        del eve_log[:]
        resolve_deepspeed_config(nested(path, neutral), CONFIG, 1)
        assert eve_log == []


def test_communication_is_not_overlapped_at_zero_3_if_the_file_says_so():
    path = "zero_optimization.overlap_comm"
    for stage, kept in ((1, {}), (2, {}), (3, {"overlap_comm": False})):
        _, resolved = resolve_deepspeed_config(at_stage(stage, path, False), CONFIG, 1)
        assert resolved["zero_optimization"] == {"stage": stage, **kept}


@pytest.fixture
def eve_log():
    """Lines that the package's logger has written."""
    import logging

    from eve_ds.log import get_logger

    lines, handler = [], logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = get_logger()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "path", [path for path in RULES if path.rpartition(".")[0] not in RULES and path not in SECTIONS]
)
def test_auto_means_no_value_for_every_key(path):
    assert resolve_deepspeed_config(nested(path, "auto"), CONFIG, 1) == resolve_deepspeed_config({}, CONFIG, 1)


def test_keys_that_start_like_a_comment_are_ignored():
    commented = {"_comment": "ours", "zero_optimization": {"//": ["x"], "stage": 1, "_why": {"a": 1}}}
    assert resolve_deepspeed_config(commented, CONFIG, 1) == resolve_deepspeed_config(
        {"zero_optimization": {"stage": 1}}, CONFIG, 1
    )


def test_all_problems_are_told_in_the_order_of_the_file():
    dictionary = {
        "train_batch_size": 16,
        "gradient_cliping": 1,
        "zero_optimization": {"overlap_comm": "true", "stage": 4, "zenflow": {"topk_ratio": 0.1}},
        "hybrid_engine": {"enabled": True},
        "fp16": {"enabled": 1},
    }
    parts = refusal(dictionary).split("; ")
    starts = [
        "train.train_batch_size (8) in the YAML contradicts train_batch_size (16)",
        "gradient_cliping in",
        'zero_optimization.overlap_comm ("true") in',
        "zero_optimization.stage (4) in",
        "zero_optimization.zenflow (",
        "hybrid_engine.enabled (true) in",
        "fp16.enabled (1) in",
    ]
    assert len(parts) == len(starts)
    assert all(part.startswith(start) for part, start in zip(parts, starts, strict=True)), parts
