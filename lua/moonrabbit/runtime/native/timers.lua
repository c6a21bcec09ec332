--- When tasks want to be woken: a binary heap with at most one entry for each task.
--
-- A task whose wait ended early stays where it is: its next deadline is nearly always later than
-- the entry, which then is moved when its time comes. So a wait with a timeout that is signalled
-- costs no heap operation and leaves no garbage, however often it happens.
--
-- Fields of a task used here: `deadline` (false: none), `entry_at` and `entry` (time and place of
-- its entry in the heap).

local floor = math.floor

local M = {}

local heap, size = {}, 0

local function sift_up(task, place)
  local at = task.entry_at
  while place > 1 do
    local parent_place = floor(place / 2)
    local parent = heap[parent_place]
    if parent.entry_at <= at then break end
    heap[place] = parent
    parent.entry = place
    place = parent_place
  end
  heap[place] = task
  task.entry = place
end

local function sift_down(task, place)
  local at = task.entry_at
  while true do
    local child_place = place * 2
    if child_place > size then break end
    local child = heap[child_place]
    local right = heap[child_place + 1]
    if child_place < size and right.entry_at < child.entry_at then
      child, child_place = right, child_place + 1
    end
    if child.entry_at >= at then break end
    heap[place] = child
    child.entry = place
    place = child_place
  end
  heap[place] = task
  task.entry = place
end

--- Takes a task's entry out, if it has one.
function M.forget(task)
  local place = task.entry
  if not place then return end
  task.entry = false
  local last = heap[size]
  heap[size] = nil
  size = size - 1
  if last == task then return end
  heap[place] = last
  last.entry = place
  sift_up(last, place)
  sift_down(last, last.entry)
end

--- The task wants to be woken at `at`.
function M.arm(task, at)
  task.deadline = at
  if not task.entry then
    size = size + 1
    task.entry_at = at
    sift_up(task, size)
  elseif at < task.entry_at then
    task.entry_at = at
    sift_up(task, task.entry)
  end
end

--- When to look again: no task is due before.
---@return number|nil
function M.next()
  local first = heap[1]
  return first and first.entry_at
end

--- A task whose deadline has passed, its entry taken out; nil when there is none (any more).
function M.due(now)
  local task = heap[1]
  while task and task.entry_at <= now do
    local deadline = task.deadline
    if deadline and deadline > now then
      task.entry_at = deadline
      sift_down(task, 1)
    else
      M.forget(task)
      if deadline then return task end
    end
    task = heap[1]
  end
  return nil
end

--- How many entries there are: never more than tasks.
function M.count() return size end

return M
