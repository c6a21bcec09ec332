--- The runtime for OpenResty and nginx with ngx_lua: cosockets, light threads, semaphores. The contract
--- of every function is in docs/internals.md.
--
-- A connection belongs to the request or timer that opened it, as its cosocket does: everything that
-- waits on it runs in light threads of that handler. Loads moonrabbit.core only.

local ffi = require "ffi"
local semaphore = require "ngx.semaphore"
local condition = require "moonrabbit.runtime.resty.condition"
local limits = require "moonrabbit.runtime.resty.limits"
local open = require "moonrabbit.runtime.resty.open"
local tasks = require "moonrabbit.runtime.resty.tasks"
local check_seconds = require "moonrabbit.runtime.shared.check_seconds"
local report = require "moonrabbit.runtime.shared.report"

local C = ffi.C
pcall(ffi.cdef, "typedef struct { long tv_sec; long tv_nsec; } moonrabbit_timespec;")
-- Under a name of our own: who else in the process declares the system's has another type of time (Kong does).
pcall(ffi.cdef, 'int moonrabbit_clock_gettime(int clock, moonrabbit_timespec *time) __asm__("clock_gettime");')

local ngx_sleep, current, check, LEAST, LONG = ngx.sleep, tasks.current, tasks.check, limits.LEAST, limits.LONG

local M = {
  name = "resty", pcall = pcall, cancelled = tasks.cancelled,
  current = current, cancel = tasks.cancel, condition = condition,
}

-- ngx.now is the wall clock, and stands still during a turn.
local timespec = ffi.new "moonrabbit_timespec"
local CLOCK_MONOTONIC = 1

local function now()
  C.moonrabbit_clock_gettime(CLOCK_MONOTONIC, timespec)
  return tonumber(timespec.tv_sec) + tonumber(timespec.tv_nsec) / 1e9
end

M.now = now

local levels = { debug = ngx.DEBUG, info = ngx.INFO, warn = ngx.WARN, error = ngx.ERR }

function M.log(level, text) ngx.log(levels[level] or ngx.INFO, "moonrabbit: ", text) end

function M.on_error(text) M.log("error", "error in a task: " .. text) end

M.spawn, M.pooled = tasks.of(function(text, task) report(M, text, task) end)

function M.sleep(seconds)
  check_seconds("sleep", seconds, 2)
  if seconds < LEAST then seconds = LEAST end
  local task = current()
  if not task then
    while seconds > LONG do
      ngx_sleep(LONG)
      seconds = seconds - LONG
    end
    return ngx_sleep(seconds)
  end
  check(task)
  local until_then = now() + seconds
  task.sleeping = semaphore.new()
  repeat
    task.sleeping:wait(seconds < LONG and seconds or LONG)
    seconds = until_then - now()
  until seconds < LEAST or task.cancelling
  task.sleeping = nil
  check(task)
end

--- See docs/internals.md.
function M.open(endpoint, tls, timeout) return open(M, endpoint, tls, timeout) end

return M
