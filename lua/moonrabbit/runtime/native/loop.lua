--- The loop: tasks, the queue of those that can run, and turns.
--
-- A task waits for one thing at a time. Whoever makes it wait records that in the task itself
-- (`on`, an object with `forget(self, task)`), calls `park`, and wakes it by `ready(task, value)`:
-- no wait allocates anything.
--
-- The loop runs in `drive`, which is called by `run`, and by `park` itself when no loop is below: in
-- a script's main chunk, or in a coroutine of the user's own. There one task without a coroutine,
-- `outside`, stands for the caller.

local net = require "moonrabbit.net"
local described = require "moonrabbit.described"
local check_seconds = require "moonrabbit.runtime.shared.check_seconds"
local report = require "moonrabbit.runtime.shared.report"
local timers = require "moonrabbit.runtime.native.timers"
local yielding = require "moonrabbit.runtime.pcall"

local create, resume, yield = coroutine.create, coroutine.resume, coroutine.yield
local owner_of, may_yield, give_way = yielding.owner, yielding.may_yield, yielding.give_way
local running_coroutine = coroutine.running
local now = net.now

--- Rounds of tasks before the descriptors get their turn, while tasks keep one another busy; and
--- the time after which they get it anyway.
local ROUNDS, ROUNDS_TIME = 8, 0.001
--- Coroutines of ended tasks that are kept for the next ones.
local SPARE_COROUTINES = 64

local M = {}

local PARKED, IDLE = {}, {} -- what a task's coroutine yields: waiting, or ended and free

M.cancelled = require "moonrabbit.runtime.shared.cancelled"

local poller = net.poller()
local running            -- the task that runs now
local driving = false    -- a loop runs below
local outside = { outside = true }
local queue, queued = {}, 0 -- tasks for the next round
local batch, batch_at, batch_size = {}, 0, 0 -- tasks of this round
local rounds, polled_at = 0, 0
local spare, spares = {}, 0
local turn_source

M.settings = nil    -- where on_error, long_turn, on_long_turn are looked up: the runtime's table
M.poller = poller
M.dispatch = nil    -- function(): hands out what the poller found; set by descriptors.lua
M.waiting = 0       -- tasks that wait for descriptors
M.watched = 0       -- signals that are watched
M.on_signals = nil  -- function(): set by signals.lua

-- ---- Waiting and waking -------------------------------------------------------------------------

--- Puts a waiting task into the queue; its `park` returns `value`.
local function ready(task, value)
  task.value = value
  task.parked = false
  task.deadline = false
  task.on = nil
  queued = queued + 1
  queue[queued] = task
end
M.ready = ready

local function detach(task)
  local on = task.on
  if on then
    task.on = nil
    on:forget(task)
  end
end

--- Takes a task out of whatever it waits in, when its yield threw instead of waiting.
local function withdraw(task)
  task.yields = false
  task.parked, task.deadline = false, false
  detach(task)
  local kept = 0
  for i = 1, queued do
    local other = queue[i]
    queue[i] = nil
    if other ~= task then
      kept = kept + 1
      queue[kept] = other
    end
  end
  queued = kept
end

--- The task that a waiting call is for. Throws where nothing may wait.
function M.enter()
  local task = running
  if task then
    local co = running_coroutine()
    if co == task.co or owner_of(co) == task.co then
      if task.yields then -- its last wait threw, and that was caught
        withdraw(task)
        yielding.suspicious = true
      end
      if not may_yield(co, task) then error(yielding.refusal, 3) end
      return task
    end
    error("this call waits, and a coroutine of your own inside a running loop cannot: "
      .. "start it with moonrabbit.spawn", 3)
  end
  if driving then
    error("this call waits, and a callback of the loop cannot: use moonrabbit.spawn in it", 3)
  end
  return outside
end

--- Gives way until the task is taken from the queue.
local function suspend(task, quiet)
  if task == outside then
    M.drive(task)
  else
    task.yields = true -- and stays so when this throws, where may_yield cannot tell beforehand
    give_way(PARKED)
    task.yields = false
  end
  if not task.cancelling then return task.value end
  task.cancelling = false
  if quiet then return nil, "cancelled" end
  error(M.cancelled, 0)
end

--- Waits until somebody calls `ready`, or until the deadline (then the value is false).
---@param quiet boolean? a cancellation is returned as nil, "cancelled" instead of thrown
function M.park(task, deadline, quiet)
  if task.cancelling then -- since before this wait: only to give way once
    detach(task)
    ready(task, false)
  else
    task.parked = true
    if deadline then timers.arm(task, deadline) end
  end
  return suspend(task, quiet)
end

--- See docs/internals.md.
function M.cancel(task)
  if task.over or task.outside then return end
  task.cancelling = true
  if task.parked then
    detach(task)
    ready(task, false)
  end
end

function M.sleep(seconds)
  check_seconds("sleep", seconds, 2)
  local task = M.enter()
  if seconds > 0 then
    M.park(task, now() + seconds)
  else
    ready(task, true)
    suspend(task)
  end
end

-- ---- Tasks --------------------------------------------------------------------------------------

local function keep(task, ...)
  if task.kept then task.results = { n = select("#", ...), ... } end
end

--- The first yield holds the arguments until the next round.
local function work(task, fn, ...)
  yield(PARKED)
  keep(task, fn(...))
end

--- The life of a coroutine: one task after another.
local function live(...)
  work(...)
  while true do work(yield(IDLE)) end
end

local function coroutine_for_task()
  if spares == 0 then return create(live) end
  local co = spare[spares]
  spare[spares] = nil
  spares = spares - 1
  return co
end

--- See docs/internals.md.
function M.spawn(fn, ...)
  if type(fn) ~= "function" then
    error("spawn: a function expected, got " .. type(fn), 2)
  end
  local task = {
    co = coroutine_for_task(), fn = fn, value = nil, on = nil, prev = nil, next = nil,
    deadline = false, entry = false, entry_at = 0, parked = false, cancelling = false, over = false,
    yields = false,
  }
  resume(task.co, task, fn, ...)
  ready(task, true)
  return task
end

local function over(task)
  if task.yields then withdraw(task) end
  task.over = true
  timers.forget(task)
end

local function describe(task, err)
  return debug.traceback(task.co, described(err))
end

local function failed(task, err)
  if task.yields then err = yielding.explain(err) end
  over(task)
  task.failed = true
  task.error = err
  if task.kept then
    if type(err) == "string" then task.error = describe(task, err) end
  elseif err ~= M.cancelled then
    report(M.settings, describe(task, err), task)
  end
end

local function ended(task)
  over(task)
  if spares < SPARE_COROUTINES then
    spares = spares + 1
    spare[spares] = task.co
  end
  task.co = nil
end

local function step(task)
  if task == outside then
    task.over = true
    return
  end
  running = task
  local ok, what = resume(task.co)
  running = nil
  if what == PARKED then return end
  if not ok then
    failed(task, what)
  elseif what == IDLE then
    ended(task)
  else
    failed(task, "a task called coroutine.yield, which means nothing to this loop: "
      .. "use sleep(0) to let others run")
  end
end

-- ---- Long turns ---------------------------------------------------------------------------------

local own_source = debug.getinfo(1, "S").source:match("^(.*)runtime[/\\]native[/\\]") or "@?"

local function is_own(info)
  return info.what == "C" or info.source:sub(1, #own_source) == own_source
end

--- Where a task stands: the innermost line that is not ours; else where its function is.
local function source_of(task)
  local level = 0
  while task.co do
    local info = debug.getinfo(task.co, level, "Sl")
    if not info then break end
    if not is_own(info) then return info.short_src .. ":" .. info.currentline end
    level = level + 1
  end
  local info = debug.getinfo(task.fn, "S")
  return info.short_src .. ":" .. info.linedefined
end

local function long_turn(task, seconds)
  turn_source = source_of(task)
  if M.settings.on_long_turn then
    local ok, err = pcall(M.settings.on_long_turn, seconds, turn_source)
    if not ok then report(M.settings, "on_long_turn: " .. described(err), task) end
  end
end

local function timed_step(task, limit)
  local started = now()
  step(task)
  local seconds = now() - started
  if seconds > limit and task ~= outside then long_turn(task, seconds) end
end

--- Where the last long turn was.
---@return string?
function M.turn_source() return turn_source end

-- ---- Turns --------------------------------------------------------------------------------------

--- Runs the tasks that are ready now, not those that they make ready. The batch is kept outside so
--- that nothing is lost when an error (of memory, of a debug hook) ends a round early.
local function round()
  if batch_at == batch_size then
    batch, queue = queue, batch
    batch_at, batch_size, queued = 0, queued, 0
  end
  local limit = M.settings.long_turn
  while batch_at < batch_size do
    batch_at = batch_at + 1
    local task = batch[batch_at]
    batch[batch_at] = nil
    if limit then timed_step(task, limit) else step(task) end
  end
end

local function wake_sleepers(time)
  local task = timers.due(time)
  while task do
    detach(task)
    ready(task, false)
    task = timers.due(time)
  end
end

local function wait_for_descriptors(timeout)
  if poller:wait(timeout) > 0 then M.dispatch() end
  if M.watched > 0 then M.on_signals() end
end

--- How long there is nothing to be done: nil for as long as no descriptor is ready.
local function patience(time)
  local at = timers.next()
  if at then return at > time and at - time or 0 end
  if M.waiting > 0 or M.watched > 0 then return nil end
  error("deadlock: every task waits for another one, and nothing else can wake them", 0)
end

---@param may_block boolean
local function poll(may_block)
  local time = now()
  local timeout = may_block and patience(time) or not may_block and 0 or nil
  if timeout ~= 0 or M.waiting > 0 or M.watched > 0 then
    wait_for_descriptors(timeout)
    time = now()
  end
  wake_sleepers(time)
  rounds, polled_at = 0, time
end

local function turns(target)
  while not target.over do
    if queued == 0 and batch_at == batch_size then poll(true) end
    round()
    rounds = rounds + 1
    if rounds >= ROUNDS or (queued > 0 and now() - polled_at > ROUNDS_TIME) then poll(false) end
  end
end

--- Whether nothing but one descriptor could get anything going: the caller is a script's main chunk, no task
--- can run, no signal is watched. Then it may wait for that descriptor by itself, without the loop, until the
--- time that this returns.
---@return number|nil until
function M.alone()
  if driving or queued > 0 or batch_at < batch_size or M.waiting ~= 1 or M.watched > 0 then return nil end
  return timers.next() or math.huge
end

--- Runs the loop until the task is over; for `outside`, until it is ready.
function M.drive(task)
  driving = true
  task.over = false
  local ok, err = pcall(turns, task)
  driving = false
  if ok then return end
  running = nil
  detach(task)
  task.parked, task.deadline = false, false
  error(err, 0)
end

--- See docs/internals.md.
function M.run(fn, ...)
  if driving then error("run: the loop runs already; use spawn", 2) end
  local task = M.spawn(fn, ...)
  task.kept = true
  M.drive(task)
  if task.failed then error(task.error, 0) end
  local results = task.results
  return (unpack or table.unpack)(results, 1, results.n) -- luacheck: ignore
end

---@return table? task the one that runs now
function M.current() return running end

return M
