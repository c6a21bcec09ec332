-- Runs the conformance cases on a runtime, in this process, and prints a line for each:
--   lua spec/support/conform.lua RUNTIME [PORT of spec/support/lines.lua [PATTERN of names]]
local loops = require "support.loops"
local conformance = require "support.conformance"
local moonrabbit = require "moonrabbit"

local name = arg[1]
io.stdout:setvbuf "line"

local function mute_system(given_up)
  local net = require "moonrabbit.net"
  local resolve, silent = net.resolve, assert(net.listen("127.0.0.1", 0))
  local question = {
    fd = function() return silent:fd() end, result = function() return nil, "again" end, close = given_up,
  }
  net.resolve = function() return question end
  return function()
    net.resolve = resolve
    silent:close()
  end
end

local function mute_libuv(given_up)
  local uv = require "luv"
  local getaddrinfo = uv.getaddrinfo
  uv.getaddrinfo = function() return { cancel = given_up } end
  return function() uv.getaddrinfo = getaddrinfo end
end

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
  t.mute_names = name == "luv" and mute_libuv or mute_system
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
