"""The host's memory: what the cases of this engine may take of it now, beside kept volumes and the other engines.

Three parts are seen together. Admission (:mod:`.admission`) orders the claims and has the budget; the ledger
(:mod:`.ledger`) says what other engines hold and want; kept volumes (:mod:`.cache`) give way to whoever waits, here or
there. A GPU's memory is :mod:`.device_memory`'s.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from .admission import Admission, Budget, Claim
from .cache import VolumeCache
from .ledger import Ledger

_INHERITANCE_S = 2.0
"""After a death: cases that hold their memory already come first."""

_STUCK_S = 3.0
"""For which cases that all need more memory than they have wait for that of other engines. These keep volumes that they
give up when they hear of it, at their next heartbeat; or have cases that end; or such as wait for ours."""


class HostMemory:
    """One engine's share. Used by one thread.

    Attributes:
        admission: the claims that are charged, and those that wait.
        cache: the volumes that are kept.
    """

    def __init__(self, folder: Path, budget: Budget, cache_bytes: int) -> None:
        """Take over what a dead engine has left in the ledger.

        Args:
            folder: the engine's own directory.
            budget: what its cases may take together.
            cache_bytes: what its kept volumes may.
        """
        self.admission = Admission(budget)
        self.cache = VolumeCache(cache_bytes)
        self._host = Ledger(folder, "host")
        self._grants_from = time.monotonic() + (_INHERITANCE_S if self._host.held() else 0.0)
        self._waits_since = self._stuck_since = math.inf

    @property
    def is_waited_for(self) -> bool:
        """Whether a case waits for memory, or for more of it."""
        return self.admission.waiting > 0 or self.admission.growing > 0

    def ask(self, claim: Claim) -> bool:
        """Queue a claim; ``False``, and nothing is kept of it, if too many wait already."""
        admission = self.admission
        while not admission.ask(claim):
            if self.cache.size and admission.would_fit(claim, admission.elsewhere - self.cache.size):
                admission.elsewhere -= self.cache.drop_oldest()
                continue
            return False
        return True

    def grant(self) -> tuple[list[int], int | None]:
        """Charge the claims that fit now, seen together with what other engines hold, and let these see it.

        Returns:
            Their numbers; and that of a claim that waits for more no longer, where all others do and nobody will give
            them any: it is to be refused.
        """
        admission, now = self.admission, time.monotonic()
        # all of it, while it is decided
        self._host.hold(admission.charged_bytes, admission.waiting_bytes, -math.inf, self.cache.size)
        admission.elsewhere = self._host.elsewhere(self._waits_since) if now >= self._grants_from else sys.maxsize
        admission.elsewhere += self.cache.size
        granted = admission.grant()
        while self.cache.size and admission.could_grant(admission.elsewhere - self.cache.size):  # it gives way
            admission.elsewhere -= self.cache.drop_oldest()
            granted += admission.grant()
        stuck = self._give_up_if_stuck(now)
        if not self.is_waited_for:
            self._waits_since = math.inf
        elif granted or self._waits_since == math.inf:
            self._waits_since = now
        self.hold()
        return granted, stuck

    def _give_up_if_stuck(self, now: float) -> int | None:
        admission = self.admission
        stuck = admission.stuck()
        self._stuck_since = math.inf if stuck is None else min(self._stuck_since, now)
        if stuck is not None and (now - self._stuck_since > _STUCK_S or not admission.could_grow(0)):
            admission.give_up(stuck)
            return stuck
        return None

    def make_room_elsewhere(self) -> bool:
        """Drop kept volumes for the cases of other engines; whether they want any, and :meth:`hold` is to follow."""
        admission = self.admission
        if not self.cache.size or not (wanted := self._host.wanted_elsewhere()):
            return False
        others = self._host.elsewhere(-math.inf) + wanted + admission.charged_bytes
        machine = admission.budget.shared_bytes or 0
        while self.cache.size and others + self.cache.size > machine:
            self.cache.drop_oldest()
        return True

    def hold(self) -> None:
        """Let the other engines see what is held now, and what is wanted next."""
        admission = self.admission
        self._host.hold(admission.charged_bytes, admission.first_waiting_bytes, self._waits_since, self.cache.size)
