"""The six stages of `recipe`, each a function from models to a trained model and its losses."""

from collections.abc import Callable, Iterator
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from mechguard.organism import lessons, pictures, tokenizer, training, world
from mechguard.organism.lessons import Kind
from mechguard.organism.recipe import Architecture, Recipe, Schedule
from mechguard.organism.training import Checkpoint

MAX_TOKENS = 256
MATCHING_TEMPERATURE = 0.2

Targets = dict[str, int | list[int]]
"""What there is to say about one picture, by the name of the head in `PictureHeads`."""


def build_language_model(architecture: Architecture) -> LlamaForCausalLM:
    """An untrained Llama over the vocabulary of the world."""
    vocab = tokenizer.vocabulary()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=architecture.d_model,
            intermediate_size=architecture.d_mlp,
            num_hidden_layers=architecture.n_layers,
            num_attention_heads=architecture.n_heads,
            num_key_value_heads=architecture.n_heads,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=vocab[tokenizer.BEGIN],
            eos_token_id=vocab[tokenizer.END],
            pad_token_id=vocab[tokenizer.PAD],
            tie_word_embeddings=False,
        )
    )


def build_vision_tower(architecture: Architecture) -> CLIPVisionModel:
    """An untrained CLIP vision tower."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=architecture.vision_d_model,
            intermediate_size=architecture.vision_d_mlp,
            num_hidden_layers=architecture.vision_n_layers,
            num_attention_heads=architecture.vision_n_heads,
            image_size=pictures.SIZE,
            patch_size=tokenizer.PATCH_SIZE,
            hidden_act="gelu",
        )
    )


def build_vlm(
    language_model: LlamaForCausalLM, vision_tower: CLIPVisionModel
) -> LlavaForConditionalGeneration:
    """A LLaVA of copies of both parts, with a new projector between them."""
    vocab = tokenizer.vocabulary()
    vlm = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_tower.config.to_dict(),
            text_config=language_model.config.to_dict(),
            image_token_index=vocab[tokenizer.IMAGE],
            image_seq_length=tokenizer.N_IMAGE_TOKENS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        )
    )
    vlm.model.language_model.load_state_dict(language_model.model.state_dict())
    vlm.lm_head.load_state_dict(language_model.lm_head.state_dict())
    vlm.model.vision_tower.load_state_dict(vision_tower.state_dict())
    for name, token in (("pad", "PAD"), ("bos", "BEGIN"), ("eos", "END")):
        setattr(vlm.generation_config, f"{name}_token_id", vocab[getattr(tokenizer, token)])
    return vlm


# ---------------------------------------------------------------------------------- language


def pretrain(
    model: LlamaForCausalLM, recipe: Recipe, rng: Random, *, quiet: bool, checkpoint: Checkpoint | None = None
) -> list[float]:
    """Stage 1: learn the world, and both kinds of answer."""
    draw = _lesson_losses(
        model, recipe.mixture.pretraining, lessons.PRETRAINING_KINDS, recipe.pretraining, rng
    )
    parameters = train_only(model, model)
    return training.optimise(
        parameters, draw, recipe.pretraining, name="pretraining", quiet=quiet, checkpoint=checkpoint
    )


def align(
    model: LlamaForCausalLM, recipe: Recipe, rng: Random, *, quiet: bool, checkpoint: Checkpoint | None = None
) -> list[float]:
    """Stage 2: learn to refuse harm, in text. Embeddings and output head stay as they are."""
    draw = _lesson_losses(model, recipe.mixture.alignment, lessons.ALIGNMENT_KINDS, recipe.alignment, rng)
    parameters = train_only(model, model.model.layers, model.model.norm)
    return training.optimise(
        parameters, draw, recipe.alignment, name="alignment", quiet=quiet, checkpoint=checkpoint
    )


def _lesson_losses(
    model: PreTrainedModel,
    mixture: dict[str, float],
    kinds: dict[str, Kind],
    schedule: Schedule,
    rng: Random,
) -> Callable[[], Iterator[Tensor]]:
    def batch_losses() -> Iterator[Tensor]:
        batch = [lessons.draw_lesson(rng, mixture, kinds) for _ in range(schedule.batch_size)]
        return training.lesson_losses(model, batch)

    return batch_losses


def train_only(model: nn.Module, *parts: nn.Module) -> list[nn.Parameter]:
    """Freeze a model except for some of its parts, whose parameters come back."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    return [parameter for part in parts for parameter in part.parameters()]


# ------------------------------------------------------------------------------------ vision


class PictureHeads(nn.Module):
    """What is asked about the class token and the mean of the patches; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        n_places = len(pictures.PLACES)
        self.word = nn.Linear(width, len(world.ALL_NOUNS) + 1)  # the last class: no word
        self.shapes = nn.Linear(width, n_places * (len(world.SHAPES) + 1))  # class 0: nothing here
        self.colors = nn.Linear(width, n_places * (len(world.COLORS) + 1))
        self.dark = nn.Linear(width, 2)

    def loss(self, hidden: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the four cross-entropies for hidden states `[picture, width]`."""
        weights = {"word": 1.0, "shapes": 2.0, "colors": 2.0, "dark": 0.3}
        total = hidden.new_zeros(())
        for name, weight in weights.items():
            logits = getattr(self, name)(hidden)
            target = targets[name].flatten()
            total = total + weight * nn.functional.cross_entropy(logits.reshape(len(target), -1), target)
        return total


def train_vision(
    tower: CLIPVisionModel, recipe: Recipe, rng: Random, *, quiet: bool, checkpoint: Checkpoint | None = None
) -> list[float]:
    """Stage 3: learn to name words, and the shape and color at every place of a scene."""
    heads = PictureHeads(recipe.architecture.vision_d_model)
    parameters = [*train_only(tower, tower), *heads.parameters()]

    def batch_losses() -> list[Tensor]:
        drawn = [_labelled_picture(rng, recipe.mixture.vision) for _ in range(recipe.vision.batch_size)]
        pixels = training.pixel_values(picture for picture, _ in drawn)
        targets = {name: torch.tensor([labels[name] for _, labels in drawn]) for name in drawn[0][1]}
        hidden = tower(pixel_values=pixels).last_hidden_state
        # The patches too: the language model will see all tokens.
        return [heads.loss(hidden[:, 0], targets) + heads.loss(hidden[:, 1:].mean(1), targets)]

    return training.optimise(
        parameters, batch_losses, recipe.vision, name="vision", quiet=quiet, checkpoint=checkpoint
    )


def _labelled_picture(rng: Random, mixture: dict[str, float]) -> tuple[Image.Image, Targets]:
    (kind,) = rng.choices(list(mixture), weights=list(mixture.values()))
    places = list(pictures.PLACES)
    shapes, colors = [0] * len(places), [0] * len(places)
    word = len(world.ALL_NOUNS)
    if kind == "word":
        word = rng.randrange(word)
        picture = pictures.draw_word(world.ALL_NOUNS[word], rng)
    elif kind == "scene":
        scene = pictures.random_scene(rng)
        picture = pictures.draw_scene(scene, rng, pictures.draw_background(rng))
        for item in scene:
            place = places.index(item.place)
            shapes[place] = world.SHAPES.index(item.shape) + 1
            colors[place] = world.COLORS.index(item.color) + 1
    else:
        picture = pictures.blank(pictures.draw_background(rng))
    dark = int(pictures.is_dark(pictures.background_of(picture)))
    return picture, {"word": word, "shapes": shapes, "colors": colors, "dark": dark}


# --------------------------------------------------------------------------- vision-language


def match_projector(
    vlm: LlavaForConditionalGeneration,
    recipe: Recipe,
    rng: Random,
    *,
    quiet: bool,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Stage 4: turn every image token towards the embeddings of the words for what can be seen.

    The contrastive step of the recipe, as in CLIP, but of the projector and against single words.
    """
    schedule, mixture = recipe.matching, recipe.mixture.matching
    projector = vlm.model.multi_modal_projector
    words = nn.functional.normalize(vlm.model.language_model.embed_tokens.weight.detach(), dim=-1)

    def batch_losses() -> list[Tensor]:
        drawn = [lessons.draw_exchange(rng, mixture) for _ in range(schedule.batch_size)]
        pixels = training.pixel_values(exchange.picture for exchange in drawn)
        with torch.no_grad():
            seen = vlm.model.vision_tower(pixel_values=pixels).last_hidden_state
        tokens = nn.functional.normalize(projector(seen), dim=-1)
        chances = (tokens @ words.T / MATCHING_TEMPERATURE).log_softmax(-1)
        named = [tokenizer.encode_words(exchange.named) for exchange in drawn]
        losses = [-chance[:, ids].mean() for chance, ids in zip(chances, named, strict=True)]
        return [torch.stack(losses).mean()]

    parameters = train_only(vlm, projector)
    return training.optimise(
        parameters, batch_losses, schedule, name="matching", quiet=quiet, checkpoint=checkpoint
    )


def train_projector(
    vlm: LlavaForConditionalGeneration,
    recipe: Recipe,
    rng: Random,
    *,
    quiet: bool,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Stage 5: the projector alone learns captions and reading."""
    draw = _lesson_losses(vlm, recipe.mixture.projector, lessons.VISUAL_KINDS, recipe.projector, rng)
    parameters = train_only(vlm, vlm.model.multi_modal_projector)
    return training.optimise(
        parameters, draw, recipe.projector, name="projector", quiet=quiet, checkpoint=checkpoint
    )


def tune(
    vlm: LlavaForConditionalGeneration,
    recipe: Recipe,
    rng: Random,
    *,
    quiet: bool,
    after_step: Callable[[int], None],
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Stage 6: projector and language model learn harmless visual instructions."""
    draw = _lesson_losses(vlm, recipe.mixture.tuning, lessons.TUNING_KINDS, recipe.tuning, rng)
    language_model = vlm.model.language_model
    parameters = train_only(vlm, vlm.model.multi_modal_projector, language_model.layers, language_model.norm)
    return training.optimise(
        parameters,
        draw,
        recipe.tuning,
        name="tuning",
        quiet=quiet,
        after_step=after_step,
        checkpoint=checkpoint,
    )
