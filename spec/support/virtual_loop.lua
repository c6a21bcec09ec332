-- A runtime whose clock the spec sets: tasks run in turn, and time jumps to the next one that sleeps. For what
-- is written on the runtime's interface and opens no socket.
local virtual = {}

function virtual.new()
  local clock, ready, sleepers, running = 1000, {}, {}, nil
  local M = { name = "virtual", errors = {} }
  M.cancelled = setmetatable({}, { __tostring = function() return "the task was cancelled" end })

  function M.now() return clock end
  function M.current() return running end

  local function wake(task, value)
    task.waits, task.value = false, value
    for i, each in ipairs(sleepers) do
      if each == task then table.remove(sleepers, i) break end
    end
    if task.on then
      for i, each in ipairs(task.on) do
        if each == task then table.remove(task.on, i) break end
      end
      task.on = nil
    end
    ready[#ready + 1] = task
  end

  function M.spawn(fn, ...)
    local arguments, n = { ... }, select("#", ...)
    local task = {}
    task.co = coroutine.create(function() fn((unpack or table.unpack)(arguments, 1, n)) end) -- luacheck: ignore
    ready[#ready + 1] = task
    return task
  end

  local function wait(seconds)
    local task = assert(running, "no task waits")
    task.waits = true
    if seconds then
      task.due = clock + seconds
      sleepers[#sleepers + 1] = task
    end
    coroutine.yield()
    if task.cancelling then
      task.cancelling = false
      error(M.cancelled, 0)
    end
    return task.value
  end

  function M.sleep(seconds) wait(seconds) end

  function M.cancel(task)
    task.cancelling = true
    if task.waits then wake(task, false) end
  end

  function M.condition()
    local waiting = {}
    return {
      wait = function(_, timeout)
        waiting[#waiting + 1] = running
        running.on = waiting
        return wait(timeout) or false
      end,
      signal = function() if waiting[1] then wake(waiting[1], true) end end,
      broadcast = function() while waiting[1] do wake(waiting[1], true) end end,
    }
  end

  function M.open() error "no sockets here" end

  local function step()
    local task = table.remove(ready, 1)
    running = task
    local ok, err = coroutine.resume(task.co)
    running = nil
    if not ok and err ~= M.cancelled then M.errors[#M.errors + 1] = debug.traceback(task.co, tostring(err)) end
  end

  --- Runs what can run now, and what can within so many seconds.
  function M.advance(seconds)
    local till = clock + (seconds or 0)
    while true do
      while ready[1] do step() end
      table.sort(sleepers, function(a, b) return a.due < b.due end)
      local first = sleepers[1]
      if not first or first.due > till then break end
      clock = math.max(clock, first.due)
      wake(first, false)
    end
    clock = till
    if M.errors[1] then error(table.concat(M.errors, "\n"), 2) end
  end

  return M
end

return virtual
