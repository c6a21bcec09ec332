-- Runs the conformance cases on a runtime, in this process, and prints a line for each:
--   lua spec/support/conform.lua RUNTIME [PORT of spec/support/lines.lua [PATTERN of names]]
local loops = require "support.loops"
local conformance = require "support.conformance"
local moonrabbit = require "moonrabbit"

local name = arg[1]
io.stdout:setvbuf "line"

loops.run(name, function(runtime)
  local t = {
    rt = runtime, moonrabbit = moonrabbit.on(name), url = os.getenv "AMQP_URL", listen = true, errors = {},
  }
  if os.getenv "AMQPS_URL" then
    local uri = assert(moonrabbit.uri.parse(os.getenv "AMQPS_URL"))
    t.tls = { host = uri.host, port = uri.port, url = os.getenv "AMQPS_URL",
      ca = os.getenv "MOONRABBIT_TLS_DIR" .. "/ca.pem" }
    t.tls_ca = true
  end
  t.lines = tonumber(arg[2])
  t.system_names = name ~= "luv"
  t.idle_turns = name == "copas" and loops.copas_ticks() and 12 or nil
  runtime.on_error = function(text) t.errors[#t.errors + 1] = text end
  local began, failed = runtime.now(), false
  conformance.run(t, function(case, result)
    failed = failed or result ~= "ok" and not result:find "^skipped"
    if os.getenv "TIMES" then io.write(("%.2f "):format(runtime.now() - began)) end
    print(case .. "\t" .. result:gsub("%c", " | "))
  end, arg[3])
  if failed then os.exit(1) end -- what it has left open would keep the loop
end)
