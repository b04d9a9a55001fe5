"""Make the page of the queue, and answer its buttons."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from browser.answers import Form, answer_form, answer_page
from browser.jobs import ENDED, ENTRY, QUEUE, WAITING, JobQueue
from browser.launch import split_words
from browser.runs import RUNNING
from browser.views import HERE, POLICY
from modules.console import in_words
from modules.errors import UserError
from modules.pages.page import render_page


def queue_page(queue: JobQueue, said: str = "") -> str:
    """Return the page of the queue. said: what went wrong. Raises OutputError if a file cannot be read."""
    jobs = queue.jobs()
    ended = [job for job in jobs if job.state in ENDED]
    values = {
        "running": [job for job in jobs if job.state == RUNNING],
        "waiting": [job for job in jobs if job.state == WAITING],
        "ended": sorted(ended, key=lambda job: ((job.process or {}).get("born", 0), job.id), reverse=True),
        "worker": queue.worker,
        "can_write": not queue.read_only,
        "said": said or queue.problem,
        "file": queue.folder / QUEUE,
        "in_words": in_words,
    }
    return render_page(HERE / "queue.html", "Queue", values, POLICY)


def queue_routes(queue: JobQueue) -> list[Route]:
    """Return the routes of the queue."""
    changes = {
        "up": lambda number: queue.move(number, -1),
        "down": lambda number: queue.move(number, 1),
        **{"stop": queue.stop, "retry": queue.retry, "remove": queue.remove},
    }

    def show(_: Request) -> Response:
        return answer("")

    def answer(said: str) -> Response:
        try:
            return answer_page(queue_page(queue, said), 422 if said else 200)
        except UserError as error:
            return PlainTextResponse(str(error), 500)

    def add(text: str) -> None:
        lines = [line.strip() for line in ENTRY.findall(text.replace("\r\n", "\n"))]
        for words in [split_words(line) for line in lines if line and not line.startswith("#")]:
            queue.add(words, Path.cwd())

    def change(request: Request, form: Form) -> Response:
        what = request.path_params["what"]
        number, line = ("".join(form.get(name, ())) for name in ("id", "line"))
        try:
            if what in ("work", "pause"):
                (queue.begin_work if what == "work" else queue.end_work)()
            elif what == "add":
                add(line)
            elif what in changes and number.isdecimal():
                changes[what](int(number))
            else:
                return PlainTextResponse("There is no such request.", 404)
        except UserError as error:
            return answer(str(error))
        return RedirectResponse("/queue", 303)

    return [Route("/queue", show), Route("/queue/{what}", answer_form(change), methods=["POST"])]
