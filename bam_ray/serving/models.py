"""The models that a server offers: its own model, the model with each adapter, and `auto`."""

from fastapi import APIRouter

from bam_ray.serving.app_parts import check_model
from bam_ray.serving.openai_responses import ModelCard, ModelList
from bam_ray.serving.served_adapters import AUTO, AdapterInfoList, AdapterUse, ServedAdapters


class ServedModels:
    """The names of models that requests may use.

    Attributes:
        base: The model without adapters.
        adapters: The adapters, if the server has any.
    """

    def __init__(self, base: ModelCard, adapters: ServedAdapters | None) -> None:
        self.base, self.adapters = base, adapters

    async def check(self, name: str) -> None:
        """Raise `RequestError` if there is no model of this name."""
        if self.adapters is not None:
            await self.adapters.find(name)
        else:
            check_model(name, self.base)

    async def choose(self, name: str, text: str) -> AdapterUse | None:
        """Return the adapter for a request with this text, or None if the server has no adapters."""
        return None if self.adapters is None else await self.adapters.choose(name, text)

    def chooses(self, name: str) -> bool:
        """Return True if the text of a request decides which adapter this model has."""
        return name == AUTO and self.adapters is not None and self.adapters.can_choose

    def card(self, name: str) -> ModelCard:
        """Return the description of a model that exists."""
        if name == self.base.id:
            return self.base
        return self.base.model_copy(update={"id": name, "parent": self.base.id})

    def cards(self) -> list[ModelCard]:
        """Return `auto`, the base model, and the adapters on the device. Thousands of others would burden clients."""
        if self.adapters is None:
            return [self.base]
        resident = [self.card(self.adapters.model_of(key.name)) for key in self.adapters.pool.resident]
        return [*([self.card(AUTO)] if self.adapters.can_choose else []), self.base, *resident]


def model_routes(models: ServedModels) -> APIRouter:
    """Return the routes that describe the models and the adapters."""
    router = APIRouter()

    @router.get("/v1/models")
    async def cards() -> ModelList:
        return ModelList(data=models.cards())

    @router.get("/v1/models/{name:path}")
    async def card(name: str) -> ModelCard:
        await models.check(name)
        return models.card(name)

    @router.get("/v1/adapters")
    async def adapters(tier: str | None = None, q: str = "") -> AdapterInfoList:
        if models.adapters is None:
            return AdapterInfoList(data=[])
        return await models.adapters.infos(tier, q)

    return router
