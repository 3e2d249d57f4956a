"""Judging a response: did the model refuse, did it comply, or neither?

Judges share one interface (`Judge`): a name, and a verdict for each exchange of request and response. Some go
by phrases (ours, or lists as published), some by repetition, some by the first token, some are models.
"""

from mechguard.judges.agreement import measure_agreement
from mechguard.judges.finding import HELP, AnyJudge, find_judge
from mechguard.judges.labels import export_sample, read_labels
from mechguard.judges.refusal import (
    PUBLISHED_LISTS,
    REFUSAL_KEYWORDS,
    CoherenceJudge,
    PublishedKeywords,
    RefusalJudge,
    is_degenerate,
    normalise,
    repeated_share,
)
from mechguard.judges.rubrics import STRONGREJECT, LlamaGuard, Rubric, RubricJudge
from mechguard.judges.speakers import ChatModel, Endpoint
from mechguard.judges.tokens import (
    LOG_ODDS,
    REFUSAL_OPENINGS,
    RefusalOdds,
    refusal_log_odds,
    refusal_token_ids,
)
from mechguard.judges.verdicts import CallableJudge, Exchange, Judge, Verdict

__all__ = [
    "HELP",
    "LOG_ODDS",
    "PUBLISHED_LISTS",
    "REFUSAL_KEYWORDS",
    "REFUSAL_OPENINGS",
    "STRONGREJECT",
    "AnyJudge",
    "CallableJudge",
    "ChatModel",
    "CoherenceJudge",
    "Endpoint",
    "Exchange",
    "Judge",
    "LlamaGuard",
    "PublishedKeywords",
    "RefusalJudge",
    "RefusalOdds",
    "Rubric",
    "RubricJudge",
    "Verdict",
    "export_sample",
    "find_judge",
    "is_degenerate",
    "measure_agreement",
    "normalise",
    "read_labels",
    "refusal_log_odds",
    "refusal_token_ids",
    "repeated_share",
]
