"""Settings that overrule other settings: a flag given now counts, whatever the run or its recipe remembers."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from clip_cid.errors import ConfigError

Settings = dict[str, Any]
"""Sections by name, as `Recipe.model_dump()` gives them."""


class Overruling(NamedTuple):
    """A setting with which others have no effect."""

    setting: str
    overruled: tuple[str, ...]
    """Settings, or whole sections as `section.`."""
    cleared: Any = None
    """The value with which it overrules nothing."""
    overrules: Callable[[Any], bool] = lambda value: value is not None
    ask: str | None = None
    """Not cleared, because only the user can say what counts instead: what to do."""


def _is_off(value: Any) -> bool:
    return value is False


OVERRULINGS = (
    Overruling("evaluate.student", ("embed.", "balance.", "cluster.", "distill."), cleared=True, overrules=_is_off),
    Overruling("embed.existing", ("embed.teacher", "embed.pretrained", "embed.precision")),
    Overruling(
        "embed.teacher",
        ("embed.pretrained",),
        overrules=lambda name: ":" in name or name == "none",
        ask="Name the teacher that the weights belong to: --embed.teacher NAME.",
    ),
    Overruling(
        "embed.views",
        ("embed.view_crop_scale",),
        overrules=lambda views: not views,
        ask="Say how many views to embed: --embed.views NUMBER.",
    ),
    Overruling("balance.enabled", ("balance.",), cleared=True, overrules=_is_off),
    Overruling(
        "balance.existing",
        (
            "balance.metric",
            "balance.threshold",
            "balance.max_threshold",
            "balance.target_removed",
            "balance.keep",
            "balance.max_radius",
            "balance.classify",
            "balance.merge_captions",
            "balance.protect",
            "balance.against",
            "balance.decisions",
            "balance.grow_from",
            "balance.truth_field",
        ),
    ),
    Overruling("balance.target_removed", ("balance.threshold",)),
    Overruling(
        "cluster.existing",
        (
            "cluster.num_centers",
            "cluster.num_text_centers",
            "cluster.iterations",
            "cluster.max_points_per_center",
            "cluster.seed",
        ),
    ),
    Overruling("cluster.texts", ("cluster.num_text_centers",), cleared=True, overrules=_is_off),
    Overruling("distill.steps", ("distill.epochs",)),
    Overruling("distill.head_perplexity", ("distill.head_scale",)),
    Overruling(
        "report.images",
        ("report.blur", "report.thumbnail_px"),
        overrules=_is_off,
        ask="Show pictures again with --report.images, or leave the flag out.",
    ),
)
"""Of every section; those that hide others first."""


def settings_given(arguments: Sequence[str], settings: Settings, short: Mapping[str, str]) -> list[str]:
    """The settings that the command line names, in its order.

    Args:
        arguments: Of the command line.
        settings: All there are.
        short: Flag without dashes -> the setting it is short for.

    Raises:
        ConfigError: A setting is given by its own flag and by the short one.
    """
    given: dict[str, str] = {}  # setting -> the flag
    for argument in arguments:
        flag = argument.partition("=")[0]
        setting = _setting_of(flag, settings, short) if flag.startswith("--") else None
        if setting is None:
            continue
        before = given.setdefault(setting, flag)
        if ("." in before) != ("." in flag):
            raise ConfigError(f"{before} and {flag} both set {setting}.", fix="Give one of them.")
    return list(given)


def let_flags_count(settings: Settings, given: Collection[str]) -> list[str]:
    """Clear the remembered settings that would overrule one given now; returns a sentence for each.

    Raises:
        ConfigError: Both are given at once, or only the user can say what counts.
    """
    cleared: list[str] = []
    for rule in OVERRULINGS:
        value = _get(settings, rule.setting)
        names = list(_overruled(rule, settings, given)) if rule.overrules(value) else []
        if not names:
            continue

        shown = f"{rule.setting}: {str(value).lower() if isinstance(value, bool) else value}"
        if rule.ask is not None:
            raise ConfigError(f"{names[0]} has no effect with {shown}.", fix=rule.ask)
        if rule.setting in given:
            raise ConfigError(
                f"{names[0]} has no effect with {shown}, and both are given.", fix="Give one of the two flags."
            )
        section, _, setting = rule.setting.partition(".")
        settings[section][setting] = rule.cleared
        cleared.append(f"{', '.join(names)} given, so {shown} of the recipe no longer counts")
    return cleared


def _overruled(rule: Overruling, settings: Settings, given: Collection[str]) -> Iterator[str]:
    """The given settings that the rule makes void; one given as nothing asks for nothing."""
    for name in given:
        hidden = any(name.startswith(one) if one.endswith(".") else name == one for one in rule.overruled)
        if hidden and name != rule.setting and _get(settings, name) is not None:
            yield name


def _setting_of(flag: str, settings: Settings, short: Mapping[str, str]) -> str | None:
    """The setting of a flag, if it has one; `--section.no-setting` switches `section.setting` off."""
    name = flag.removeprefix("--").replace("-", "_")
    section, dot, last = name.partition(".")
    if not dot:
        return short.get(name)

    switched_off = ".".join([section, *last.split(".")[:-1], last.split(".")[-1].removeprefix("no_")])
    for setting in (name, switched_off):
        try:
            _get(settings, setting)
        except (KeyError, TypeError):
            continue
        return setting
    return None


def _get(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value[part]
    return value
