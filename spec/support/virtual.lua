--- A runtime whose time stands still until the spec moves it: now, sleep, spawn, current and conditions.

local virtual = {}

local Condition = {}
Condition.__index = Condition

local unpack = table.unpack or unpack -- luacheck: ignore 143 113

local function resume(task, ...)
  local before = task.runtime._current
  task.runtime._current = task
  local ok, err = coroutine.resume(task.thread, ...)
  task.runtime._current = before
  if not ok then error(err, 0) end
end

--- Yields until signalled, or until the time is up.
function Condition:wait(timeout)
  local runtime = self.runtime
  local task = assert(runtime._current, "a wait outside of a task")
  local wake = { task = task, at = timeout and runtime._now + timeout or math.huge, condition = self }
  self[#self + 1] = wake
  runtime._waits[wake] = true
  return coroutine.yield()
end

local function wake_up(runtime, wake, signalled)
  runtime._waits[wake] = nil
  for i, other in ipairs(wake.condition) do
    if other == wake then table.remove(wake.condition, i) break end
  end
  runtime._ready[#runtime._ready + 1] = { wake.task, signalled }
end

function Condition:signal()
  if self[1] then wake_up(self.runtime, self[1], true) end
end

function Condition:broadcast()
  while self[1] do self:signal() end
end

--- Runs what is ready, until nothing is.
local function settle(runtime)
  while #runtime._ready > 0 do
    local entry = table.remove(runtime._ready, 1)
    resume(unpack(entry))
  end
end

--- A runtime; `advance(seconds)` moves its time and runs what is due on the way, `run(fn)` runs a task until it
--- waits, and answers whether it has ended.
function virtual.new()
  local runtime = { _now = 1000, _ready = {}, _waits = {}, name = "virtual" }
  function runtime.now() return runtime._now end
  function runtime.current() return runtime._current end
  function runtime.condition() return setmetatable({ runtime = runtime }, Condition) end
  function runtime.sleep(seconds) runtime.condition():wait(seconds) end
  function runtime.spawn(fn, ...)
    local task = { thread = coroutine.create(fn), runtime = runtime }
    runtime._ready[#runtime._ready + 1] = { task, ... }
    return task
  end
  function runtime.settle() settle(runtime) end
  function runtime.run(fn)
    local task = runtime.spawn(fn)
    settle(runtime)
    return coroutine.status(task.thread) == "dead"
  end
  function runtime.advance(seconds)
    local target = runtime._now + seconds
    settle(runtime)
    while true do
      local next_wake
      for wake in pairs(runtime._waits) do
        if wake.at <= target and (not next_wake or wake.at < next_wake.at) then next_wake = wake end
      end
      if not next_wake then break end
      runtime._now = math.max(runtime._now, next_wake.at)
      wake_up(runtime, next_wake, false)
      settle(runtime)
    end
    runtime._now = target
  end
  return runtime
end

return virtual
