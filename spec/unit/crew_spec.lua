-- What the parent of workers does by itself, on a clock that the spec sets.
local notify = require "moonrabbit.life.notify"
local virtual = require "support.virtual_loop"
local watch = require("moonrabbit.life.crew.watch").watch

describe("the parent of workers", function()
  it("tells systemd in time that it is alive, while a worker does not answer", function()
    local runtime = virtual.new()
    local times, killed
    local send = notify.send
    finally(function() notify.send = send end)
    notify.send = function(state)
      if state == "WATCHDOG=1" then times[#times + 1] = runtime.now() end
    end
    for _, seconds in ipairs { 0.5, 1, 2, 5, 30 } do -- half of WatchdogSec
      times, killed = { runtime.now() }, {}
      local member = { number = 1, pid = 17, ready = true, answered = runtime.now() }
      function member.look(_, timeout) runtime.sleep(timeout) end
      function member.signal(_, name) killed[#killed + 1] = { name, runtime.now() - member.answered } end
      local task = runtime.spawn(watch, { runtime = runtime, members = { member }, log = function() end }, seconds)
      runtime.advance(20 * seconds + 20)
      runtime.cancel(task)
      runtime.advance(0)
      for i = 2, #times do assert.is_true(times[i] - times[i - 1] <= 1.5 * seconds, seconds) end
      assert.is_true(#times > 10)
      assert.equal("KILL", killed[1][1])
      assert.is_true(killed[1][2] <= 2 * seconds + 2 + 2 * math.min(5, seconds) + 2, killed[1][2])
    end
  end)
end)
