--- The runtime for luv (libuv): tasks are coroutines that callbacks of uv.run resume.
--
-- Any coroutine may wait, the user's own too. Nothing that goes wrong in one of them is thrown from a
-- callback: it is reported through `on_error`. Handles are active only while something is waited for,
-- so that uv.run returns when nothing is open; those of a connection are closed with it.
-- Names are looked up by uv.getaddrinfo.

local now = require("moonrabbit.net").now
local described = require "moonrabbit.described"
local hosted = require "moonrabbit.runtime.shared.hosted"
local names = require "moonrabbit.runtime.shared.names"
local uv = hosted.library "luv"
local timers = require "moonrabbit.runtime.luv.timers"

local start_timer, give_back = timers.start, timers.give_back
local create, resume, yield, status = coroutine.create, coroutine.resume, coroutine.yield, coroutine.status

--- Rounds of tasks before descriptors get their turn, while tasks keep one another busy.
local ROUNDS, ROUNDS_TIME = 8, 0.001

local host = {
  name = "luv",
  outside = "it must be made in a coroutine, and uv.run must be running: "
    .. "start one with moonrabbit.on \"luv\".spawn, in callbacks too",
  home = function() return true end,
}

---@class moonrabbit.runtime.luv
local M

-- ---- Coroutines that can run: an idle handle, active while there are any, runs them -----------------------------------------

local idle
local queue, queued = {}, 0
local spare = {}

local function step(co, task)
  local ok, err = resume(co)
  if not ok and err ~= M.cancelled then M.failed(debug.traceback(co, described(err)), task) end
end

local function round()
  local batch, n = queue, queued
  queue, queued, spare = spare, 0, batch
  for i = 1, n do
    local task = batch[i]
    batch[i] = nil
    local co = task.woken
    task.woken = nil
    if co and status(co) == "suspended" then step(co, task) end
  end
end

local run_queue

local function activate()
  if not idle or idle:is_closing() then idle = uv.new_idle() end -- a user may have closed every handle
  if not idle:is_active() then idle:start(run_queue) end
end

function run_queue()
  local started, rounds = now(), 0
  repeat
    round()
    rounds = rounds + 1
  until queued == 0 or rounds == ROUNDS or now() - started > ROUNDS_TIME
  if queued == 0 then idle:stop() else activate() end
end

local function enqueue(task, co)
  if task.woken then return end
  task.woken = co
  if queued == 0 or idle:is_closing() then activate() end
  queued = queued + 1
  queue[queued] = task
end

function host.start(fn, task) enqueue(task, create(fn)) end

-- ---- Pauses -----------------------------------------------------------------------------------------------------------------

local function expired(task)
  if task.co and task.parked then enqueue(task, task.co) end
end

local function stop_timer(task)
  local timer = task.timer
  if not timer then return end
  task.timer = nil
  give_back(timer)
end

function host.pause(task, seconds)
  if seconds == 0 then
    enqueue(task, task.co)
  elseif seconds then
    task.timer = start_timer(task, seconds, expired)
  end
  yield()
  stop_timer(task)
  return false
end

function host.withdraw(task)
  task.woken = nil
  stop_timer(task)
end

function host.wake(task) enqueue(task, task.co) end

-- ---- Descriptors ------------------------------------------------------------------------------------------------------------

local polls = {} -- fd -> handle

function host.set(fd, events)
  local poll = polls[fd]
  if events == "" then
    if poll then
      polls[fd] = nil
      if not poll:is_closing() then poll:close() end
    end
    return true
  end
  if not poll or poll:is_closing() then
    local text
    poll, text = uv.new_poll(fd)
    if not poll then return nil, text end
    polls[fd] = poll
  end
  poll:start(events, function(err, ready)
    -- An error is found out by whoever reads or writes.
    M.notify(fd, err ~= nil or ready:find("r", 1, true) ~= nil, err ~= nil or ready:find("w", 1, true) ~= nil)
  end)
  return true
end

-- ---- Names ------------------------------------------------------------------------------------------------------------------

local function ask(name, _, answer)
  local request, text = uv.getaddrinfo(name, nil, { socktype = "stream" }, function(err, found)
    local texts = {}
    for i, one in ipairs(found or {}) do texts[i] = one.addr end
    answer(err, texts)
  end)
  if not request then return nil, text end
  return function() request:cancel() end
end

function host.look_up(loop) return names.of(loop, ask) end

M = hosted.runtime(host)

return M
