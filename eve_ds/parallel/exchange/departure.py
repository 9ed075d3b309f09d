"""Autograd nodes at both ends of a trip: one starts an exchange, the other waits for it, in both directions.

What is computed between the two nodes overlaps with the exchange. The nodes are joined by an empty tensor, which only
tells autograd their order; the rows themselves are on the trip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eve_ds.parallel.exchange.steps import Trip


def depart(rows: Tensor, trip: Trip) -> Tensor:
    """Start the exchange of rows (R, D); return the ticket for :func:`arrive`."""
    return Departure.apply(rows, trip)


def arrive(ticket: Tensor, trip: Trip) -> Tensor:
    """Wait for the exchange; return the rows that arrived."""
    return Arrival.apply(ticket, trip)


class Departure(torch.autograd.Function):
    """Starts an exchange; the backward waits for the gradients of the rows that were sent."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip) -> Tensor:
        """(R, D) -> (0,)."""
        ctx.trip = trip
        trip.start(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None]:
        """(0,) -> (R, D)."""
        return ctx.trip.arrive(), None


class Arrival(torch.autograd.Function):
    """Waits for an exchange; the backward starts the exchange of the gradients."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: Trip) -> Tensor:
        """(0,) -> (S, D)."""
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """(S, D) -> (0,)."""
        ctx.trip.start(gradient, back=True)
        return gradient.new_empty(0), None
