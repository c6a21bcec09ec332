-- The contract of runtimes (spec/support/conformance.lua), inside nginx, whose peers are in another process. What is about
-- servers, or another authority in one location, is left out: nginx has no such thing; spec/resty/tls_spec.lua is about
-- that.
local broker = require "support.broker"
local conformance = require "support.conformance"
local nginx = require "support.nginx"
local process = require "support.process"

describe("the contract of runtimes in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local server, lines
  local results = {}

  setup(function()
    local parsed = broker.parsed()
    lines = process.start { "spec/support/lines.lua", parsed.host, parsed.port }
    assert(lines:await "\n", lines:err())
    server = nginx.start {
      path = "$here/spec/?.lua;",
      main = "env AMQPS_URL;\nenv LINES_PORT;",
      env = { AMQPS_URL = broker.tls_url or "", LINES_PORT = lines:out():match "%d+" },
      http = "lua_max_running_timers 64;"
        .. (broker.tls_dir and ("lua_ssl_trusted_certificate %s/ca.pem;"):format(broker.tls_dir) or ""),
      server = [[
        location /ping { return 200; }
        location /conform {
          content_by_lua_block {
            local rabbit = require "moonrabbit.resty"
            local runtime = require "moonrabbit.runtime.resty"
            -- nginx's clock is of the last time that it woke up, so its timers may be early, and are set again.
            local t = { rt = runtime, moonrabbit = rabbit, url = os.getenv "AMQP_URL", errors = {},
              lines = tonumber(os.getenv "LINES_PORT"), wakes = 4, write_is_deaf = true }
            local amqps = os.getenv "AMQPS_URL"
            if amqps ~= "" then
              local uri = assert(require "moonrabbit.uri".parse(amqps))
              t.tls = { host = uri.host, port = uri.port, url = amqps }
            end
            runtime.on_error = function(text) t.errors[#t.errors + 1] = text end
            local lines, over = {}, runtime.condition()
            runtime.spawn(function()
              require "support.conformance".run(t, function(name, result)
                lines[#lines + 1] = name .. "\t" .. result:gsub("%c", " | ")
                ngx.log(ngx.NOTICE, "conformance: ", lines[#lines]) -- where it stops, if it does
              end)
              over:signal()
            end)
            over:wait(160)
            ngx.say(table.concat(lines, "\n"))
            ngx.exit(ngx.OK) -- with whatever a case that failed has left
          }
        }
      ]],
    }
    server:ready "/ping"
    for line in (server:request("/conform", { timeout = 170 }) or ""):gmatch "[^\n]+" do
      local name, result = line:match "^(.-)\t(.*)$"
      if name then results[name] = result end
    end
  end)

  teardown(function()
    server:stop()
    lines:stop()
  end)

  for _, case in ipairs(conformance.cases) do
    it(case.name, function()
      local result = results[case.name] or "it was not run: " .. server:log()
      if result:find "^skipped" then pending(result) else assert.equal("ok", result) end
    end)
  end
end)
