-- Nobody who waits wakes up for nothing: the system calls of a process with an idle connection, counted by strace
-- between two marks (files that are not there, opened).
local broker = require "support.broker"
local loops = require "support.loops"
local process = require "support.process"

-- To set the time, to wait, to be woken: what one turn is made of.
local TURN = 8
-- Copas 3 and later turns ten times a second for its own timeouts.
local function own_turns(runtime, seconds)
  return runtime == "copas" and loops.copas_ticks() and 12 * seconds or 0
end

local WAITS = { epoll_wait = true, epoll_pwait = true, poll = true, ppoll = true, select = true, pselect6 = true }

-- Whether a call may sleep; those that only look have no time to.
local function waits_in(call)
  return WAITS[call:match "^%w+"] and not call:find ", 0%) = " and not call:find ", 0, NULL, 8%) = "
    and not call:find "{tv_sec=0, tv_nsec=0}, NULL%) = "
end

-- A frame of a heartbeat as strace shows it: type 8, channel 0, no payload, its end.
local HEARTBEAT = [[\10\0\0\0\0\0\0\316]]

local script = [[
package.path = %q .. package.path
local loops = require "support.loops"
loops.run(%q, function(runtime)
  local conn = assert(require("moonrabbit").on(%q).connect { uri = os.getenv "AMQP_URL", heartbeat = %d })
  local ch = assert(conn:channel())
  local consumer = assert(ch:consume(assert(ch:queue_declare("", { exclusive = true })).queue))
  runtime.spawn(function() consumer:receive(60) end)
  runtime.sleep(0.6) -- over half of the short interval: what was to wake it while it worked has done so
  io.open "/moonrabbit-begin"
  runtime.sleep(%g)
  io.open "/moonrabbit-end"
  conn:close()
end)
]]

-- The calls of a process with a connection that is idle for so long; nil, why: strace does not work here.
local function calls_while_idle(runtime, heartbeat, seconds)
  local path, trace = process.file(script:format("./spec/?.lua;", runtime, runtime, heartbeat, seconds)), os.tmpname()
  local words = { "strace", "-qq", "-e", "trace=!%memory", "-o", trace, process.lua, "-e", process.setup(), path }
  local result = process.run(words, { raw = true })
  local text = process.slurp(trace) or ""
  os.remove(path)
  os.remove(trace)
  if text == "" then return nil, "strace does not work here: " .. result.err end
  assert(result.code == 0, result.err)
  return assert(text:match "moonrabbit%-begin[^\n]*\n(.-)[^\n]*moonrabbit%-end", text:sub(-2000))
end

local function count(text)
  local calls, waits, heartbeats = 0, 0, 0
  for call in text:gmatch "[^\n]+" do
    calls = calls + 1
    if waits_in(call) then waits = waits + 1 end
    if call:find(HEARTBEAT, 1, true) then heartbeats = heartbeats + 1 end
  end
  return calls, waits, heartbeats
end

-- LeakSanitizer traces a process at its end, which it cannot when strace does.
describe("an idle connection #noasan", function()
  local path = package.path
  teardown(function() package.path = path end)

  for _, runtime in ipairs { "native", "cqueues", "copas", "luv" } do
    local it_idles = broker.it_unless(it, pending, not loops.has(runtime) and runtime .. " is not installed"
      or broker.none())

    it_idles("makes no system calls in " .. runtime, function()
      local text, why = calls_while_idle(runtime, 60, 2)
      if not text then return pending(why) end
      local calls = count(text)
      assert.truthy(calls <= TURN + own_turns(runtime, 2) * 3, calls .. " calls:\n" .. text)
    end)

    it_idles("wakes up for heartbeats, and for nothing else, in " .. runtime, function()
      local text, why, calls, waits, heartbeats
      for _ = 1, 3 do
        text, why = calls_while_idle(runtime, 1, 3.2)
        if not text then return pending(why) end
        calls, waits, heartbeats = count(text)
        if heartbeats >= 8 then break end -- or the machine, which is busy, was late with them
      end
      assert.truthy(heartbeats >= 8, text) -- each side sends one each half of the interval
      assert.truthy(waits <= heartbeats + 1 + own_turns(runtime, 3.2), ("%d waits:\n%s"):format(waits, text))
      assert.truthy(calls <= TURN * (heartbeats + 1 + own_turns(runtime, 3.2)), ("%d calls:\n%s"):format(calls, text))
    end)
  end
end)
