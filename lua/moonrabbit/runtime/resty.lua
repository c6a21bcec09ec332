--- The runtime for OpenResty and nginx with ngx_lua: cosockets, light threads, semaphores. The contract
--- of every function is in docs/internals.md.
--
-- A connection belongs to the request or timer that opened it, as its cosocket does: everything that
-- waits on it runs in light threads of that handler. Loads moonrabbit.core only.

local ffi = require "ffi"
local semaphore = require "ngx.semaphore"
local transport = require "moonrabbit.runtime.resty.transport"

local C = ffi.C
pcall(ffi.cdef, "typedef struct { long tv_sec; long tv_nsec; } moonrabbit_timespec;")
pcall(ffi.cdef, "int clock_gettime(int clock, void *time);")

local ngx_sleep, thread_spawn, running = ngx.sleep, ngx.thread.spawn, coroutine.running

local M = { name = "resty", pcall = pcall }

-- ---- Time -------------------------------------------------------------------------------------------

-- ngx.now is the wall clock, and stands still during a turn.
local timespec = ffi.new "moonrabbit_timespec"
local CLOCK_MONOTONIC = 1

function M.now()
  C.clock_gettime(CLOCK_MONOTONIC, timespec)
  return tonumber(timespec.tv_sec) + tonumber(timespec.tv_nsec) / 1e9
end

-- nginx without OpenResty's patches has no zero delay and complains about it.
local LEAST = 0.001
-- As long as nginx's timers allow with some room; waits without a timeout are made of these.
local LONG = 86400

-- ---- Tasks ------------------------------------------------------------------------------------------

local tasks = setmetatable({}, { __mode = "k" }) -- coroutine -> task

M.cancelled = setmetatable({}, { __tostring = function() return "the task was cancelled" end })

local levels = { debug = ngx.DEBUG, info = ngx.INFO, warn = ngx.WARN, error = ngx.ERR }

function M.log(level, text) ngx.log(levels[level] or ngx.INFO, "moonrabbit: ", text) end

function M.on_error(text) M.log("error", "error in a task: " .. text) end

local function traceback(err)
  if err == M.cancelled then return err end
  return debug.traceback(tostring(err), 2)
end

local function perform(task)
  tasks[running()] = task
  local ok, err = xpcall(task.fn, traceback, unpack(task, 1, task.n))
  task.over = true
  if not ok and err ~= M.cancelled then M.on_error(err, task) end
end

-- The body of a light thread: its task, and in a pool, one after the other, what comes then.
local function thread_body(task, pool)
  ngx_sleep(LEAST) -- a task starts at the next turn
  perform(task)
  if not pool then return end
  local seat = { called = semaphore.new() }
  while not pool.over do
    pool[#pool + 1] = seat
    while not seat.task and not pool.over do seat.called:wait(LONG) end
    local following = seat.task
    seat.task = nil
    if following then perform(following) end
  end
end

function M.spawn(fn, ...)
  if type(fn) ~= "function" then error("spawn: fn must be a function, not a " .. type(fn), 2) end
  local parent = tasks[running()]
  local pool = parent and parent.pool
  local task = { fn = fn, n = select("#", ...), pool = pool, ... }
  local seat = pool and not pool.over and table.remove(pool)
  if seat then
    seat.task = task
    seat.called:post(1)
    return task
  end
  local thread, err = thread_spawn(thread_body, task, pool)
  if not thread then error("cannot start a light thread: " .. tostring(err), 2) end
  return task
end

--- Runs `fn` in the calling handler, which is to live long. nginx frees what a light thread has used only
--- with its handler (250 bytes each), so the tasks that start in `fn`, and in those, share light threads, one
--- after the other. They end with fn.
function M.pooled(fn, ...)
  local pool = { over = false }
  local me = running()
  local before = tasks[me]
  tasks[me] = { pool = pool }
  local results = { pcall(fn, ...) }
  tasks[me] = before
  pool.over = true
  for i = 1, #pool do pool[i].called:post(1) end
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2, table.maxn(results))
end

function M.current()
  return tasks[running()]
end

--- The task's current or next wait throws M.cancelled; one to write to the network ends first.
function M.cancel(task)
  if task.over then return end
  task.cancelling = true
  if task.on then task.on:broadcast() end
  if task.sleeping then task.sleeping:post(1) end
end

--- Throws M.cancelled in a task that was cancelled.
function M.check_cancelled()
  local task = tasks[running()]
  if task and task.cancelling then
    task.cancelling = false
    error(M.cancelled, 0)
  end
end

local check_cancelled = M.check_cancelled

function M.sleep(seconds)
  if type(seconds) ~= "number" or seconds ~= seconds then error("sleep: seconds must be a number", 2) end
  if seconds < LEAST then seconds = LEAST end
  local task = tasks[running()]
  if not task then return ngx_sleep(seconds) end
  check_cancelled()
  local until_then = M.now() + seconds
  task.sleeping = semaphore.new()
  repeat
    task.sleeping:wait(seconds < LONG and seconds or LONG)
    seconds = until_then - M.now()
  until seconds < LEAST or task.cancelling
  task.sleeping = nil
  check_cancelled()
end

-- ---- Conditions -------------------------------------------------------------------------------------

local Condition = {}
Condition.__index = Condition

function Condition:wait(timeout)
  local task = tasks[running()]
  if task then
    if task.cancelling then check_cancelled() end
    task.on = self
  end
  self.waiting = self.waiting + 1
  local ok
  if timeout and timeout < LONG then
    -- Less than a millisecond is none to nginx, which would not yield.
    if timeout > 0 and timeout < LEAST then timeout = LEAST end
    ok = self.semaphore:wait(timeout)
  else
    repeat ok = self.semaphore:wait(LONG) until ok or timeout and timeout < math.huge
  end
  if task then task.on = nil end
  self.waiting = self.waiting - 1
  if ok then
    self.posted = self.posted - 1
  elseif self.posted > self.waiting then
    -- The signal came with the timeout: it was this one's, and is not kept.
    self.semaphore:wait(0)
    self.posted = self.posted - 1
  end
  if task and task.cancelling then check_cancelled() end
  return ok and true or false
end

function Condition:signal()
  if self.posted < self.waiting then
    self.posted = self.posted + 1
    self.semaphore:post(1)
  end
end

function Condition:broadcast()
  local n = self.waiting - self.posted
  if n > 0 then
    self.posted = self.posted + n
    self.semaphore:post(n)
  end
end

function M.condition()
  return setmetatable({ semaphore = semaphore.new(), waiting = 0, posted = 0 }, Condition)
end

-- ---- Transports -------------------------------------------------------------------------------------

--- See docs/internals.md.
function M.open(endpoint, tls, timeout)
  local opened, kind, text, temporary = transport.open(M, endpoint, tls, timeout)
  return opened, kind, text, temporary
end

return M
