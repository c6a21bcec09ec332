-- Nobody who waits wakes up for nothing: the system calls of a process with an idle connection, counted by strace
-- between two marks (files that are not there, opened).
local broker = require "support.broker"
local loops = require "support.loops"
local process = require "support.process"

local SECONDS = 2
-- To set the time, to wait, to be woken: what one turn is made of. Copas 4 and later turns ten times a second
-- for its own timers.
local MOST = { native = 8, cqueues = 8, luv = 8, copas = loops.copas_ticks() and 30 * SECONDS or 8 }

local script = [[
package.path = %q .. package.path
local loops = require "support.loops"
loops.run(%q, function(runtime)
  local conn = assert(require("moonrabbit").on(%q).connect { uri = os.getenv "AMQP_URL", heartbeat = 60 })
  local ch = assert(conn:channel())
  local consumer = assert(ch:consume(assert(ch:queue_declare("", { exclusive = true })).queue))
  runtime.spawn(function() consumer:receive(60) end)
  runtime.sleep(0.1)
  io.open "/moonrabbit-begin"
  runtime.sleep(%d)
  io.open "/moonrabbit-end"
  conn:close()
end)
]]

local function calls_while_idle(runtime)
  local path, trace = process.file(script:format("./spec/?.lua;", runtime, runtime, SECONDS)), os.tmpname()
  local words = { "strace", "-qq", "-e", "trace=!%memory", "-o", trace, process.lua, "-e", process.setup(), path }
  local result = process.run(words, { raw = true })
  local text = process.slurp(trace) or ""
  os.remove(path)
  os.remove(trace)
  if text == "" then return nil, "strace does not work here: " .. result.err end
  assert(result.code == 0, result.err)
  local between = assert(text:match "moonrabbit%-begin[^\n]*\n(.-)[^\n]*moonrabbit%-end", text:sub(-2000))
  return select(2, between:gsub("\n", "")), between
end

describe("an idle connection #noasan", function()
  local path = package.path
  teardown(function() package.path = path end)

  for _, runtime in ipairs { "native", "cqueues", "copas", "luv" } do
    local it_idles = broker.it_unless(it, pending, not loops.has(runtime) and runtime .. " is not installed"
      or broker.none())
    it_idles("makes no system calls in " .. runtime, function()
      local calls, text = calls_while_idle(runtime)
      if not calls then return pending(text) end
      assert.truthy(calls <= MOST[runtime], calls .. " calls:\n" .. text)
    end)
  end
end)
