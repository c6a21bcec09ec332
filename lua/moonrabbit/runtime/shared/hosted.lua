--- Runtimes inside somebody else's loop: tasks are coroutines of that loop, and wait in its way.
--
-- A host is what an adapter knows of its loop:
--
-- * `name`, and `outside`: what to do about a call from elsewhere, for people
-- * `home()`: nil outside the loop, else what things that are waited for belong to
-- * `start(fn, task)`: runs fn in a coroutine of the loop, at its next turn
-- * `pause(task, seconds, watch, events)`: the running coroutine waits for `wake(task)`, for so long,
--   or (where the adapter brings no `set`) for the descriptor watch.fd: true when that is ready
-- * `wake(task)`: ends that pause at the loop's next turn
-- * `withdraw(task)`: that pause could not begin, for the coroutine may not yield (optional)
-- * `set(fd, events)`: the loop calls back when descriptors are ready (shared/descriptors.lua)
-- * `forget(fd)`: a descriptor is going to be closed (optional)
-- * `refuse(fd)`: why the loop cannot wait for it, for people (optional; where the adapter brings no `set`)
-- * `look_up(loop, by_system)`: the loop's own resolver (optional; shared/open.lua)
--
-- Any coroutine of the loop may wait; it is a task from then on.

local net = require "moonrabbit.net"
local yielding = require "moonrabbit.runtime.pcall"
local cancelled = require "moonrabbit.runtime.shared.cancelled"
local check_seconds = require "moonrabbit.runtime.shared.check_seconds"
local condition = require "moonrabbit.runtime.shared.condition"
local descriptors = require "moonrabbit.runtime.shared.descriptors"
local open = require "moonrabbit.runtime.shared.open"
local report = require "moonrabbit.runtime.shared.report"
local server = require "moonrabbit.runtime.shared.server"
local transport = require "moonrabbit.runtime.shared.transport"

local now, max = net.now, math.max
local unpack = table.unpack or unpack -- luacheck: ignore 143 113
local running_coroutine, owner_of, may_yield = coroutine.running, yielding.owner, yielding.may_yield

local M = {}

--- The library of a loop; throws where it is not installed.
---@param name string of the module, of its rock, and of the runtime
function M.library(name)
  local found, library = pcall(require, name)
  if found then return library end
  error(("the runtime '%s' needs the module %s (luarocks install %s; Debian: lua-%s): %s"):format(name, name, name,
    name, tostring(library):match "[^\n]+"), 0)
end

--- The running coroutine, as the loop knows it; nil in the main chunk, where nothing can wait.
---@return thread?
function M.coroutine()
  local co, main = running_coroutine()
  if main or not co then return nil end
  return owner_of(co)
end

local coroutine_of_loop = M.coroutine

local function detach(task)
  task.parked = false
  local on = task.on
  if on then
    task.on = nil
    on:forget(task)
  end
end

-- The task's yield threw: nobody may resume it for what it waited for.
local function withdrawer(host)
  return function(task)
    detach(task)
    task.co = nil
    if host.withdraw then host.withdraw(task) end
  end
end

--- enter, park and ready, as native/loop.lua has them.
local function waiting(host)
  local tasks = setmetatable({}, { __mode = "k" }) -- coroutine -> task, which must not lead back to it
  local loop = { home = host.home, waiting = 0, tasks = tasks, cancelled = cancelled }
  local pause, wake, home_of = yielding.explaining(host.pause, withdrawer(host)), host.wake, host.home

  local function task_of(co)
    local task = tasks[co]
    if not task then
      task = { parked = false, cancelling = false, over = false }
      tasks[co] = task
    end
    return task
  end

  --- The task that a waiting call is for. Throws where nothing may wait, or not for this.
  ---@param home any what is waited for belongs to; nil: to nothing
  function loop.enter(home)
    local here = home_of()
    local co = here and coroutine_of_loop()
    if not co then error("this call waits, and with the runtime '" .. host.name .. "' " .. host.outside, 3) end
    if home and home ~= here then error(host.elsewhere, 3) end
    local task = task_of(co)
    if task.parked then detach(task) end -- its last wait threw, and that was caught
    if not may_yield(running_coroutine(), task) then error(yielding.refusal, 3) end
    task.co = co
    return task
  end

  --- Wakes a waiting task; its `park` returns `value`.
  function loop.ready(task, value)
    task.value, task.parked, task.on = value, false, nil
    wake(task)
  end

  --- Waits until somebody calls `ready`, the descriptor is ready (true), or the deadline has come (false).
  ---@param quiet boolean? a cancellation is returned as nil, "cancelled" instead of thrown
  function loop.park(task, deadline, quiet, watch, events)
    if not task.cancelling then
      task.parked, task.value = true, false
      repeat
        local found = pause(task, deadline and max(0, deadline - now()), watch, events)
        if found and task.parked then
          task.value = true
          detach(task)
        end
      until not task.parked or deadline and now() >= deadline
    end
    if task.parked or task.on then detach(task) end
    task.co = nil
    if not task.cancelling then return task.value end
    task.cancelling = false
    if quiet then return nil, "cancelled" end
    error(cancelled, 0)
  end

  function loop.current()
    local co = home_of() and coroutine_of_loop()
    return co and task_of(co) or nil
  end

  --- See docs/internals.md.
  function loop.cancel(task)
    if task.over then return end
    task.cancelling = true
    if task.parked then
      detach(task)
      loop.ready(task, false)
    end
  end

  return loop
end

--- As shared/descriptors.lua, where a task's own pause waits for the descriptor.
local function own_descriptors(host, loop)
  local enter, park, ready, home = loop.enter, loop.park, loop.ready, host.home
  local D = {}
  local Watch = {}
  Watch.__index = Watch

  function Watch:forget(task) self.tasks[task] = nil end

  --- nil, text: the loop cannot wait for this one.
  function D.watch(fd)
    local text = host.refuse and host.refuse(fd)
    if text then return nil, text end
    return setmetatable({ fd = fd, home = home(), tasks = {} }, Watch)
  end

  --- Throws in another of the loops than the one that it was opened in.
  function D.check_home(watch)
    local here = home()
    if here and here ~= watch.home then error(host.elsewhere, 0) end
  end

  -- The last of those that a closed descriptor waits for closes it.
  local function leave(watch)
    watch.leaving = watch.leaving - 1
    if watch.leaving > 0 then return end
    host.forget(watch.left)
    watch.owner:close()
  end

  function D.wait(watch, events, deadline, quiet)
    local task = enter(watch.home)
    if not watch.fd then return nil end
    task.on, watch.tasks[task] = watch, true
    local value, given_up = park(task, deadline, true, watch, events)
    if watch.owner then leave(watch) end
    if given_up and not quiet then error(cancelled, 0) end
    return value, given_up
  end

  function D.unwatch(watch)
    local fd, tasks, n = watch.fd, watch.tasks, 0
    if not fd then return 0 end
    watch.fd, watch.left, watch.tasks = nil, fd, {}
    if host.forget then host.forget(fd) end
    for task in pairs(tasks) do
      n = n + 1
      ready(task, nil)
    end
    return n
  end

  -- A loop that remembers descriptors (`forget`) may look once more at one that two tasks wait for, when
  -- the first of them is resumed: so it stays open until both are.
  function D.release(watch, owner)
    local n = D.unwatch(watch)
    if n > 1 and host.forget then
      watch.owner, watch.leaving = owner, n
    else
      owner:close()
    end
  end

  return D
end

--- A runtime (docs/internals.md) in the host's loop.
---@return table
function M.runtime(host)
  local loop = waiting(host)
  local tasks, enter, park = loop.tasks, loop.enter, loop.park
  local waits = host.set and descriptors.of(loop, host.set) or own_descriptors(host, loop)
  local new_transport = transport.of(waits)
  local connect = open.of(waits, new_transport, cancelled, host.look_up and function(by_system)
    return host.look_up(loop, by_system)
  end)

  local runtime = {
    name = host.name, now = now, cancelled = cancelled,
    current = loop.current, cancel = loop.cancel,
    condition = condition.of(loop),
    listen = server.of(waits, new_transport),
    notify = waits.notify,
  }

  function runtime.open(...)
    enter().co = nil
    return connect(...)
  end

  function runtime.sleep(seconds)
    check_seconds("sleep", seconds, 2)
    park(enter(), now() + seconds)
  end

  function runtime.on_error(text)
    io.stderr:write("moonrabbit: error in a task: ", text, "\n")
  end

  --- An error that left a coroutine.
  ---@param text string with its traceback
  function runtime.failed(text, task) report(runtime, text, task) end

  local function live(task, fn, ...)
    local co = coroutine_of_loop()
    tasks[co] = task
    local ok, err, text = yielding.traced(fn, ...)
    task.over = true
    if task.parked then detach(task) end
    tasks[co] = nil
    if not ok and err ~= cancelled then report(runtime, text, task) end
  end

  function runtime.spawn(fn, ...)
    if type(fn) ~= "function" then error("spawn: a function expected, got " .. type(fn), 2) end
    local task = { parked = false, cancelling = false, over = false }
    local arguments, n = { ... }, select("#", ...)
    host.start(function() live(task, fn, unpack(arguments, 1, n)) end, task)
    return task
  end

  return runtime
end

return M
