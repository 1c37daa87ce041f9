"""What a client is told when its request cannot be answered, in OpenAI's form."""

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An HTTP status, one sentence, and the parameter that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


UNKNOWN = ApiError(500, "an error in the server; its log says more")


def error_response(error: ApiError) -> JSONResponse:
    """Return the error as OpenAI's clients read it."""
    headers = {"retry-after": "5"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers)
