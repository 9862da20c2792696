"""The models that a recipe's students learn from, with their licences."""

from cascade.models.checkpoint.load import ModelSource, resolve_model
from cascade.recipe.licences import Origin, endpoint_terms, licence_of, require_acknowledged
from cascade.recipe.places import served_model
from cascade.recipe.schema import Recipe


def origins_of(recipe: Recipe) -> list[Origin]:
    """The parent, unless the recipe trains it, students that are there already, and who writes the text."""
    origins = []
    parent = recipe.parent.model
    if parent:
        cut = all(member.start in ("prune", "layers") for member in recipe.members)
        source = resolve_model(parent, revision=recipe.parent.revision)
        origins.append(_origin("parent", source, derived=cut))
    students = sorted({member.student for member in recipe.members if member.student})
    origins += [_origin("members.student", resolve_model(student), derived=True) for student in students]
    settings = recipe.generate
    if settings is not None and settings.endpoint is not None:
        endpoint = settings.endpoint
        name = f"{served_model(endpoint.model)} at {endpoint.url}"
        origins.append(Origin("generate.endpoint", name, endpoint_terms(endpoint.url)))
    elif settings is not None and settings.teacher != "parent":
        origins.append(_origin("generate.teacher", resolve_model(settings.teacher), derived=False))
    return origins


def check_licences(recipe: Recipe) -> None:
    """Refuse what has terms that the recipe does not acknowledge.

    Raises:
        UserError: with the terms.
    """
    require_acknowledged(origins_of(recipe), recipe.acknowledged)


def _origin(place: str, source: ModelSource, *, derived: bool) -> Origin:
    return Origin(place, source.reference, licence_of(source.folder), derived)
