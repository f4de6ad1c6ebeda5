"""Classification requests: what waits for the engine, and the response."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lcl_adapter.answering import api_types
from lcl_adapter.answering.api_types import JudgeName
from lcl_adapter.errors import UserError
from lcl_adapter.serve.calibrate import Calibration
from lcl_adapter.serve.jobs import Job
from lcl_adapter.serve.model import Model
from lcl_adapter.serve.sets import ShownSet, judgement_of
from lcl_adapter.serve.store import StoredSet


@dataclass
class Classification:
    """A classification request that is being answered.

    judge: who decides. jobs: one for each image, or the error of an image that cannot be used.
    """

    stored: StoredSet
    shown: ShownSet
    model: Model
    judge: JudgeName
    calibration: Future[Calibration] | None
    jobs: list[Job | UserError]

    @property
    def futures(self) -> list[Future[Any]]:
        calibration = [self.calibration] if self.calibration else []
        return calibration + [job.future for job in self.jobs if isinstance(job, Job)]

    def cancel(self) -> None:
        """Cancel the jobs. The calibration goes on, for other requests about the set need it too."""
        for job in self.jobs:
            if isinstance(job, Job):
                job.cancelled.set()

    def response(self) -> api_types.ClassifyOut:
        """Call it when every future is done.

        Raises what the calibration raised; an image's own fault is in its result.
        """
        calibration = self.calibration.result() if self.calibration else Calibration()
        return api_types.ClassifyOut(
            model=self.model.name,
            support_set=self.stored.name,
            version=self.stored.version,
            calibration=api_types.CalibrationOut(
                temperature=calibration.temperature, threshold=calibration.threshold, left_out=calibration.left_out, right=calibration.right
            ),
            judge=self.judge,
            parts=max((job.future.result().parts for job in self.jobs if isinstance(job, Job) and not job.future.exception()), default=1),
            results=[self._judgement(calibration, job) for job in self.jobs],
        )

    def _judgement(self, calibration: Calibration, job: Job | UserError) -> api_types.Judgement:
        error = job if isinstance(job, UserError) else job.future.exception()
        if isinstance(error, UserError):
            # the image cannot be used, or the question failed
            code = "invalid_image" if error is job else "invalid_value"
            return api_types.Judgement(error=api_types.Fault(message=str(error), type="invalid_request_error", code=code))
        if error is not None:
            raise error
        assert isinstance(job, Job)
        return judgement_of(self.shown, job.future.result(), calibration)
