"""Settings of train_collab."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from llmrec.artifacts import SemanticIds
from llmrec.collab.configs.bert4rec import Bert4RecConfig
from llmrec.collab.configs.comirec import ComirecConfig
from llmrec.collab.configs.diffurec import DiffurecConfig
from llmrec.collab.configs.diffusion import DiffusionConfig
from llmrec.collab.configs.fuxi import FuxiConfig
from llmrec.collab.configs.gmvae import GmvaeConfig
from llmrec.collab.configs.gru4rec import GRU4RecConfig
from llmrec.collab.configs.mamba import MambaConfig
from llmrec.collab.configs.mamba4rec import Mamba4RecConfig
from llmrec.collab.configs.mind import MindConfig
from llmrec.collab.configs.moe import MoeConfig
from llmrec.collab.configs.motor import MotorConfig
from llmrec.collab.configs.sasrec import SASRecConfig
from llmrec.collab.configs.svae import SvaeConfig
from llmrec.collab.configs.tiger import TigerConfig
from llmrec.config import StageSettings, require
from llmrec.encoders.config import vector_files
from llmrec.own import OwnName, OwnSettings, is_own

ProviderName = Literal[
    "sasrec",
    "gru4rec",
    "bert4rec",
    "svae",
    "gmvae",
    "mamba4rec",
    "mamba",
    "diffurec",
    "diffusion",
    "fuxi",
    "moe",
    "comirec",
    "mind",
    "tiger",
    "motor",
    "precomputed",
]

PROVIDER_FIELDS = tuple(name for name in get_args(ProviderName) if name != "precomputed")
"""Fields of TrainCollabConfig that hold one model's settings; named like the provider."""


CODED = ("tiger", "motor")
"""Models that read items as codes."""


@dataclass(frozen=True, kw_only=True)
class TrainCollabConfig(StageSettings, path="train_collab"):
    """Collaborative item vectors: a sequence model trained on item ids, or vectors from a file."""

    provider: ProviderName | OwnName = "sasrec"
    """Where the vectors come from: the model to train, or the file `vectors`. A model of your own is
    package.module:Class, a `llmrec.collab.provider.CollabProvider`; its settings are in own."""

    own: OwnSettings = field(default_factory=dict)
    """Settings of a model of your own, by name of its constructor's arguments, such as
    embed_dim=64,dropout_rate=0.2; num_items comes with them."""

    vectors: str | None = None
    """File of ready-made item vectors (.parquet or .safetensors) for provider='precomputed', or for a model
    whose content names collab; such as another run's train_collab/item_embeddings.safetensors."""

    semantic_ids: str | None = None
    """Folder that learn_semantic_ids made of the same items in another run: its codes take the place of codes
    by k-means, for provider='tiger' or 'motor', whose content names modalities of it."""

    sasrec: SASRecConfig = field(default_factory=SASRecConfig)

    gru4rec: GRU4RecConfig = field(default_factory=GRU4RecConfig)

    bert4rec: Bert4RecConfig = field(default_factory=Bert4RecConfig)

    svae: SvaeConfig = field(default_factory=SvaeConfig)

    gmvae: GmvaeConfig = field(default_factory=GmvaeConfig)

    mamba4rec: Mamba4RecConfig = field(default_factory=Mamba4RecConfig)

    mamba: MambaConfig = field(default_factory=MambaConfig)

    diffurec: DiffurecConfig = field(default_factory=DiffurecConfig)

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    fuxi: FuxiConfig = field(default_factory=FuxiConfig)

    moe: MoeConfig = field(default_factory=MoeConfig)

    comirec: ComirecConfig = field(default_factory=ComirecConfig)

    mind: MindConfig = field(default_factory=MindConfig)

    tiger: TigerConfig = field(default_factory=TigerConfig)

    motor: MotorConfig = field(default_factory=MotorConfig)

    layout: Literal["auto", "prefixes"] = "auto"
    """How histories become training rows. auto: every user once, where the model allows it; prefixes: one
    row per target, as most published code does, far slower. Both have the same loss where that is ce and
    nothing is random (Fuxi-MME's balance apart, which counts every item that a row shows); models whose
    loss needs a user's targets in one row refuse prefixes."""

    windows: Literal["auto", "last", "all"] = "auto"
    """Targets of users with more than max_history items. last: the last max_history; all: every one, from
    rows of max_history targets (positions) or after its own last max_history items (prefixes); auto: as the
    models' papers do, last for models that take a user in one pass (with layout=prefixes, too), all for those
    that need a row per target."""

    epochs: int = 200
    """Most passes over the training users."""

    batch_size: int = 256
    """Users, or targets, per optimiser step."""

    batch_by: Literal["users", "targets"] = "users"
    """What batch_size counts. users: everything of that many users. targets: next items to predict, drawn one
    by one for models that take a row for each, as their papers count; else the users who make up as many."""

    learning_rate: float = 1e-3
    """Step size of Adam."""

    decay_every_epochs: int | None = None
    """Epochs after which the learning rate is multiplied by decay_rate, again and again; none: it stays."""

    decay_rate: float = 0.1
    """See decay_every_epochs."""

    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) per unit of learning_rate; spares biases, norms and Mamba's states."""

    clip_norm: float = 5.0
    """Largest norm of the gradient; it is scaled down to this."""

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Matrix products of the model while it learns; tf32 changes nothing on a CPU, and bfloat16 leaves the
    products with all item vectors in float32. Rankings, those of validation too, are computed in float32."""

    include_valid: bool = False
    """Learn from the validation items too, once settings and epochs are known; see recipes' --refit."""

    select: Literal["valid", "last"] = "valid"
    """Weights to keep: of the best validation ndcg@10, or of the last epoch (no validation at all)."""

    eval_every_epochs: int = 1
    """Epochs between rankings of the validation items."""

    patience: int | None = 10
    """Stop after so many validations in a row without a better ndcg@10; none: never."""

    mask_seen: bool = True
    """Leave items of a user's history out when validation items are ranked, as evaluate.mask_seen does for
    test items."""

    save_every_minutes: float = 10.0
    """Least minutes between checkpoints, at ends of epochs, that a stopped run goes on from; 0: none."""

    seed: int = 0
    """Seed of initial weights, user order, dropout and negatives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "eval_every_epochs", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train_collab.{name} must be at least 1, got {value}")
        require(
            self.save_every_minutes >= 0,
            f"train_collab.save_every_minutes must be at least 0, got {self.save_every_minutes}",
        )
        require(
            self.decay_every_epochs is None or self.decay_every_epochs >= 1,
            f"train_collab.decay_every_epochs must be none or at least 1, got {self.decay_every_epochs}",
        )
        require(
            self.decay_every_epochs is not None or self.decay_rate == TrainCollabConfig.decay_rate,
            "train_collab.decay_rate has no effect without decay_every_epochs",
        )
        require(
            0 < self.decay_rate <= 1, f"train_collab.decay_rate must lie in (0, 1], got {self.decay_rate}"
        )
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            require(value > 0, f"train_collab.{name} must be greater than 0, got {value}")
        require(
            self.weight_decay >= 0, f"train_collab.weight_decay must be at least 0, got {self.weight_decay}"
        )
        require(self.seed >= 0, f"train_collab.seed must be at least 0, got {self.seed}")
        require(
            self.eval_every_epochs <= self.epochs or self.select == "last",
            "train_collab.eval_every_epochs must be at most train_collab.epochs with select='valid' (no "
            f"epoch would be ranked), got {self.eval_every_epochs} and {self.epochs}",
        )
        require(
            not self.include_valid or self.select == "last",
            "train_collab.include_valid learns from validation items, so they cannot choose the epoch; set "
            f"train_collab.select=last and train_collab.epochs, got select={self.select!r}",
        )
        if self.layout == "prefixes":
            self._refuse_prefixes_of_another_loss()
        if self.windows == "all" and self.provider == "svae":
            self._refuse_windows_of_another_loss()
        self._refuse_settings_without_effect()

    def incidental_fields(self) -> tuple[str, ...]:
        """Settings that change how the result is computed, but not the result."""
        return ("save_every_minutes",)

    @property
    def content(self) -> tuple[str, ...]:
        """Modalities of encode_items that the model to train takes."""
        return tuple(name for name in self.reads_vectors_of if name != "collab")

    @property
    def reads_vectors_of(self) -> tuple[str, ...]:
        """Modalities that the model to train takes, item vectors of another model (collab) among them."""
        return () if self.semantic_ids is not None else self.names_content

    @property
    def names_content(self) -> tuple[str, ...]:
        """Modalities that the settings of the model to train name, wherever these come from."""
        return () if self.is_own else getattr(getattr(self, self.provider, None), "content", ())

    def optional_inputs(self) -> bool:
        """Whether it takes encode_items."""
        return bool(self.content)

    @property
    def is_own(self) -> bool:
        """Whether the model is one of the user's own."""
        return is_own(self.provider)

    @property
    def of_model(self) -> dict[str, Any]:
        """Settings of the model that is trained, by argument of its constructor."""
        return dict(self.own) if self.is_own else asdict(getattr(self, self.provider))

    def source_files(self) -> dict[str, str]:
        """The users' own files that the result depends on, by setting."""
        if self.semantic_ids is None:
            return vector_files("vectors", self.vectors)
        files = SemanticIds.files(self.semantic_ids, self.names_content)
        return {f"semantic_ids {name}".rstrip(): path for name, path in files.items()}

    def own_classes(self) -> dict[str, str]:
        """Classes of the users' own whose code the result depends on, by setting."""
        return {"provider": self.provider} if self.is_own else {}

    def idle_fields(self) -> list[str]:
        """Settings of the models that are not trained; they hold defaults and are not written down."""
        return [name for name in (*PROVIDER_FIELDS, "own") if not self.reads(name)]

    def reads(self, name: str) -> bool:
        """Whether a group of settings is that of the model."""
        return name == ("own" if self.is_own else self.provider)

    def _refuse_prefixes_of_another_loss(self) -> None:
        """Refuse layout=prefixes for models that would learn something else from a row per target; the others
        learn the same in another order."""
        must = "train_collab.layout must be auto with"
        require(
            self.provider != "bert4rec",
            f"{must} provider='bert4rec' (it fills in masked items of whole rows), got prefixes",
        )
        require(
            self.provider != "gmvae" or self.gmvae.prior == "standard",
            f"{must} gmvae.prior='mixture' (interests are made of whole rows and ranked by each row's last "
            "target), got prefixes",
        )
        if self.provider == "svae":
            require(
                self.svae.num_next == 1,
                f"{must} svae.num_next={self.svae.num_next} (its rows have one target each), got prefixes",
            )
            require(
                self.svae.kl_scope == "target",
                f"{must} svae.kl_scope='user' (it averages a user's divergences, and a row has one), got "
                "prefixes; or set svae.kl_scope=target",
            )

    def _refuse_windows_of_another_loss(self) -> None:
        """Refuse windows=all for what SVAE says of a whole user, or of items beyond a window's end."""
        must = "train_collab.windows must be auto or last with"
        require(
            self.svae.num_next == 1,
            f"{must} svae.num_next={self.svae.num_next} (the next items of a window's last ones stand in "
            "another window), got all",
        )
        require(
            self.svae.kl_scope == "target",
            f"{must} svae.kl_scope='user' (it averages a user's divergences, and a window has a part of "
            "them), got all; or set svae.kl_scope=target",
        )

    def _refuse_settings_without_effect(self) -> None:
        """A setting that cannot change the result is a mistake of whoever set it."""
        precomputed = self.provider == "precomputed"
        reads_file = precomputed or "collab" in self.reads_vectors_of
        reason = f"provider={self.provider!r}"
        why = reason if precomputed else f"train_collab.{self.provider}.content=collab"
        require(
            not reads_file or self.vectors is not None,
            f"train_collab.vectors must be a file of item vectors with {why}, got none",
        )
        if self.semantic_ids is not None:
            self._check_coded()
        idle = self.idle_fields()
        if precomputed:
            idle += [name for name in names(self) if name not in ("provider", "vectors", *idle)]
        elif not reads_file:
            codes = "" if self.semantic_ids is None else " and semantic_ids"
            self.refuse_changed(["vectors"], f"{reason}{codes}")
        self.refuse_changed(idle, reason)
        if self.select == "last":
            self.refuse_changed(["eval_every_epochs", "patience", "mask_seen"], "select='last'")

    def _check_coded(self) -> None:
        """Refuse semantic IDs for a model that reads none."""
        require(self.semantic_ids != "", "train_collab.semantic_ids must be a folder (or none), got ''")
        require(
            self.provider in CODED,
            f"train_collab.semantic_ids has no effect with provider={self.provider!r}; models of codes are "
            f"{', '.join(CODED)}",
        )
        require(
            bool(self.names_content),
            f"train_collab.semantic_ids has no effect with train_collab.{self.provider}.content=none; name "
            "modalities that it has codes of",
        )
        if self.provider == "motor":
            self.motor.refuse_changed(["quantizer"], "semantic_ids")


def names(config: TrainCollabConfig) -> list[str]:
    return [spec.name for spec in fields(config)]


NO_FIELD = set(PROVIDER_FIELDS) - set(TrainCollabConfig.__dataclass_fields__)
assert not NO_FIELD, f"TrainCollabConfig needs a field for the settings of {NO_FIELD}"
