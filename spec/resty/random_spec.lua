-- Workers of nginx are forked from a master in which moonrabbit may have been loaded, and have drawn, before.
local broker = require "support.broker"
local nginx = require "support.nginx"

describe("random numbers in nginx #resty", function()
  if nginx.missing() then pending(nginx.missing()) return end

  local WORKERS = 3
  local server

  setup(function()
    server = nginx.start {
      workers = WORKERS,
      http = [[
        init_by_lua_block {
          local random = require "moonrabbit.random"
          DRAWN_BY_THE_MASTER = random.number()
        }
      ]],
      server = [[
        location /draw {
          content_by_lua_block {
            local random = require "moonrabbit.random"
            DRAWN = DRAWN or { random.number(), random.number(), random.number(), (random.hex(8)) }
            ngx.sleep(0.02) -- so that other workers get their share of the requests
            ngx.say(ngx.worker.pid(), " ", table.concat(DRAWN, " "))
          }
        }
      ]],
    }
    server:ready "/draw"
  end)

  teardown(function() server:stop() end)

  it("are others in each worker", function()
    local native = require "moonrabbit.runtime.native"
    local workers, count = {}, 0
    broker.eventually(function()
      local asked = 0
      for _ = 1, 12 do -- at once: one worker alone does not take them all
        native.spawn(function()
          local pid, numbers = (server:request "/draw" or ""):match "^(%d+) (.-)%s*$"
          if pid and not workers[pid] then
            workers[pid] = numbers
            count = count + 1
          end
          asked = asked + 1
        end)
      end
      broker.eventually(function() return asked == 12 end)
      return count == WORKERS
    end, 30, "all workers have answered")
    local seen = {}
    for pid, numbers in pairs(workers) do
      local n = 0
      for number in numbers:gmatch "%S+" do
        assert.is_nil(seen[number], "workers " .. pid .. " and " .. tostring(seen[number]) .. " drew the same")
        seen[number], n = pid, n + 1
      end
      assert.equal(4, n)
    end
  end)
end)
