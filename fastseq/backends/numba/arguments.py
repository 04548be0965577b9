"""Where the drivers' arguments lie: one array of 64-bit integers, addresses and sizes."""

from __future__ import annotations

# [0:3] belong to fastseq.backends.numba.threads.
STEPS = 3
BATCH = 4
HIDDEN = 5  # units that exist, H
UNITS = 6  # units in a column of memory: H and what pads it to whole tiles
DIRECTIONS = 7
ALIVE = 8  # int64 [T]: sequences that take part in a step, never increasing; 0: all of them
STARTS = 9  # int64 [T]: row of the records that holds the first sequence of a step; 0: see STEP
STRIDE = 10  # rows from one sequence to the next
OUTPUT_STARTS = 11  # the same two for the output's rows, and OUTPUT_STEP
OUTPUT_STRIDE = 12
OUTPUT_WIDTH = 13  # elements of an output row, D*WIDTH
OUTPUT = 14
GRAD_OUTPUT = 15  # laid out as the output; 0 where no gradient arrives
FEW = 16  # 1: sum up for few rows, see product.py
RECORD_SIZE = 17  # elements of a record
SAVE = 18  # 1: forward keeps entries for backward
PRODUCT = 19  # address of the compiled product
STEP = 20  # rows from one step to the next, where there is no array STARTS
OUTPUT_STEP = 21
WIDTH = 22  # of a hidden state: H, or P with a projection
WIDTH_UNITS = 23  # what that is padded to
BARRIER = 24  # address of an int64 0, where threads wait for each other
GIVE_WAY = 25  # address of sched_yield
COMMON = 26

# From DIRECTION_FIRST + direction * DIRECTION_SIZE on:
DIRECTION_FIRST = COMMON
RECORDS = 0  # [rows, RECORD_SIZE]: columns of UNITS, then the projected state before the step
STATES = 1  # [B, states, UNITS]
WEIGHTS = 2  # packed recurrent weights; 0 where there is no product left to do
HIDDEN_BIAS = 3  # [slots of the recurrent product alone, UNITS]
PARAMETERS = 4  # [parameters, UNITS]
MASKS = 5  # [T or 1, B or 1, masks, UNITS]
MASK_STEP = 6  # elements from step to step, and from sequence to sequence
MASK_SEQUENCE = 7
GRADIENTS = 8  # [rows, gradient columns of UNITS, then the gradient of the projected state]
STATE_GRADIENTS = 9  # [B, states, UNITS]
PROJECTION = 10  # packed weights of the projection; 0 where there is none
PROJECTED = 11  # [B, WIDTH_UNITS]: the projected hidden state; in backward its gradient
DIRECTION_SIZE = 12

SIZE = DIRECTION_FIRST + 2 * DIRECTION_SIZE
