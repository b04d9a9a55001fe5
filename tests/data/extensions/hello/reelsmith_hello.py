"""A page of the browser: /hello counts the runs."""

from starlette.responses import PlainTextResponse
from starlette.routing import Route


def make_routes(site):
    def show(request):
        return PlainTextResponse(f"hello, {len(site.runs.list_all())} runs")

    return [Route("/hello", show)]
