"""Errors as HTTP responses in OpenAI's format."""

import math

from fastapi.responses import JSONResponse

from bam_ray.errors import AdapterUnavailable, Overloaded, RetryLater, ServingError
from bam_ray.serving.metrics import RequestCounter
from bam_ray.serving.openai_types import ErrorResponse, RateLimited, RequestError


class ErrorResponder:
    """A converter of errors to responses, which counts the requests that are refused."""

    def __init__(self, metrics: RequestCounter) -> None:
        self._metrics = metrics

    def response(self, error: ServingError, status: int = 500) -> JSONResponse:
        """Return the response for an error. `status` is that of errors which have none of their own."""
        headers = {}
        if isinstance(error, RequestError):
            status = error.status
        if isinstance(error, Overloaded):
            status = 429
        if isinstance(error, AdapterUnavailable):
            status = 503
        if isinstance(error, RetryLater | RateLimited):
            headers["retry-after"] = str(math.ceil(error.retry_after))
            headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        if status < 500:
            self._metrics.count_request("refused")
        return JSONResponse(ErrorResponse.from_error(error).model_dump(), status, headers)
