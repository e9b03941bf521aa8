"""Which exposures are used: figures against limits, and a person's word above both.

Pure judgement; nothing is measured again. `judge` gives the first limit that an exposure breaks, in the order
of `RULES`, so the same figures and limits always give the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from stream.records.values import PreprocessResult, QualityLimits

OVERRULED = "overruled"
"""The rule that is named when a person rejected the exposure."""

EXCLUDED = "excluded_time"
"""The rule that is named when a person excluded the time at which the exposure was taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFigures:
    """What an exposure is judged by, about 0.3 kB; None = not determined.

    `has_rings` is False when a CTF fit found no Thon rings: its numbers are then None. The defocus is the mean
    of u and v, the astigmatism u − v.
    """

    has_rings: bool | None
    ctf_fit_angstrom: float | None
    astigmatism_angstrom: float | None
    defocus_angstrom: float | None
    total_motion_angstrom: float | None
    early_motion_angstrom: float | None
    ice_ratio: float | None
    crystalline_ice: float | None
    masked_fraction: float | None
    n_picks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One limit, the figure it holds against, and how both are said."""

    limit: str
    figure: str
    words: str
    unit: str = ""
    decimals: int = 1

    @property
    def is_upper(self) -> bool:
        """True when the figure is at most the limit."""
        return self.limit.startswith("max_")

    @property
    def is_of_ctf(self) -> bool:
        """True when the figure comes from the CTF fit: no rings then break the limit."""
        return self.figure in {"ctf_fit_angstrom", "astigmatism_angstrom", "defocus_angstrom"}


RULES: tuple[Rule, ...] = (
    Rule(limit="max_ctf_fit_angstrom", figure="ctf_fit_angstrom", words="CTF fit to", unit=" Å"),
    Rule(
        limit="max_astigmatism_angstrom",
        figure="astigmatism_angstrom",
        words="astigmatism",
        unit=" Å",
        decimals=0,
    ),
    Rule(limit="min_defocus_angstrom", figure="defocus_angstrom", words="defocus", unit=" Å", decimals=0),
    Rule(limit="max_defocus_angstrom", figure="defocus_angstrom", words="defocus", unit=" Å", decimals=0),
    Rule(limit="max_total_motion_angstrom", figure="total_motion_angstrom", words="total motion", unit=" Å"),
    Rule(limit="max_early_motion_angstrom", figure="early_motion_angstrom", words="early motion", unit=" Å"),
    Rule(limit="max_ice_ratio", figure="ice_ratio", words="ice ratio", decimals=2),
    Rule(limit="max_crystalline_ice", figure="crystalline_ice", words="crystalline ice", unit=" sd"),
    Rule(limit="max_masked_fraction", figure="masked_fraction", words="masked fraction", decimals=2),
    Rule(limit="min_picks", figure="n_picks", words="picks", decimals=0),
    Rule(limit="max_picks", figure="n_picks", words="picks", decimals=0),
)
RULE_NAMES: tuple[str, ...] = (*(rule.limit for rule in RULES), OVERRULED, EXCLUDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """A limit that an exposure breaks: its name, and value and rule in words."""

    rule: str
    reason: str


def figures_of(result: PreprocessResult) -> QualityFigures:
    """Return what an exposure is judged by."""
    ctf, motion = result.ctf, result.motion
    fit = ctf if ctf is not None and ctf.is_reliable else None
    return QualityFigures(
        has_rings=None if ctf is None else ctf.is_reliable,
        ctf_fit_angstrom=None if fit is None else fit.fit_resolution_angstrom,
        astigmatism_angstrom=None if fit is None else fit.defocus_u_angstrom - fit.defocus_v_angstrom,
        defocus_angstrom=None if fit is None else (fit.defocus_u_angstrom + fit.defocus_v_angstrom) / 2.0,
        total_motion_angstrom=None if motion is None else motion.total_motion_angstrom,
        early_motion_angstrom=None if motion is None else motion.early_motion_angstrom,
        ice_ratio=result.ice_ratio,
        crystalline_ice=result.crystalline_ice,
        masked_fraction=result.masked_fraction,
        n_picks=result.n_picks,
    )


def find_breaches(figures: QualityFigures, limits: QualityLimits) -> Iterator[Breach]:
    """Yield every limit that the figures break; a value equal to its limit keeps it."""
    for rule in RULES:
        limit = getattr(limits, rule.limit)
        if limit is None:
            continue
        if rule.is_of_ctf and figures.has_rings is False:
            yield Breach(rule=rule.limit, reason=f"no Thon rings were found (rule: {rule.limit} {limit:g})")
            continue
        value = getattr(figures, rule.figure)
        if value is None or not (value > limit if rule.is_upper else value < limit):
            continue
        bound = "at most" if rule.is_upper else "at least"
        reason = f"{rule.words} {value:.{rule.decimals}f}{rule.unit} (rule: {bound} {limit:g}{rule.unit})"
        yield Breach(rule=rule.limit, reason=reason)


def judge(figures: QualityFigures, limits: QualityLimits) -> Breach | None:
    """Return the first limit that the figures break, or None when the exposure is accepted."""
    return next(find_breaches(figures, limits), None)


def describe_limits(limits: QualityLimits) -> str:
    """Say in words which limits are applied."""
    given = {field.name: getattr(limits, field.name) for field in fields(limits)}
    said = [f"{name} {value:g}" for name, value in given.items() if value is not None]
    return ", ".join(said) or "none"
