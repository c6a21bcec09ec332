--- Tasks as light threads, in which alone cosockets wait. Each starts at the next turn.
--
-- Where a task waits it says so, for whoever cancels it: `task.on` is the condition, `task.sleeping` a semaphore.

local semaphore = require "ngx.semaphore"
local described = require "moonrabbit.described"
local limits = require "moonrabbit.runtime.resty.limits"
local cancelled = require "moonrabbit.runtime.shared.cancelled"

local ngx_sleep, thread_spawn, running = ngx.sleep, ngx.thread.spawn, coroutine.running
local LEAST, LONG = limits.LEAST, limits.LONG

local tasks = setmetatable({}, { __mode = "k" }) -- coroutine -> task

local M = { cancelled = cancelled }

---@return table? task the one that runs now
function M.current() return tasks[running()] end

--- See docs/internals.md. A task that is writing to the network ends that first.
function M.cancel(task)
  if task.over then return end
  task.cancelling = true
  if task.on then task.on:broadcast() end
  if task.sleeping then task.sleeping:post(1) end
end

--- Throws `cancelled` in a task that was cancelled.
---@param task table
function M.check(task)
  if task.cancelling then
    task.cancelling = false
    error(cancelled, 0)
  end
end

local function traceback(err)
  if err == cancelled then return err end
  return debug.traceback(described(err), 2)
end

--- `spawn` and `pooled` of docs/internals.md.
---@param failed fun(text: string, task: table) is told of errors that leave a task; must not throw
function M.of(failed)
  local function perform(task)
    tasks[running()] = task
    local ok, err = xpcall(task.fn, traceback, unpack(task, 1, task.n))
    task.over = true
    if not ok and err ~= cancelled then failed(err, task) end
  end

  -- The body of a light thread: its task, and in a pool, one after the other, what comes then.
  local function thread_body(task, pool)
    ngx_sleep(LEAST) -- the next turn
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

  local function spawn(fn, ...)
    if type(fn) ~= "function" then error("spawn: a function expected, got " .. type(fn), 2) end
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
  local function pooled(fn, ...)
    local pool, me = { over = false }, running()
    local before = tasks[me]
    tasks[me] = { pool = pool }
    local results = { pcall(fn, ...) }
    tasks[me] = before
    pool.over = true
    for i = 1, #pool do pool[i].called:post(1) end
    if not results[1] then error(results[2], 0) end
    return unpack(results, 2, table.maxn(results))
  end

  return spawn, pooled
end

return M
