-- The management API and the mode "smart" inside nginx: over cosockets, whatever LuaSocket's name says.
local broker = require "support.broker"
local nginx = require "support.nginx"
local ok, unique = broker.ok, broker.unique

describe("the management API in nginx #resty", function()
  local api_url = os.getenv "AMQP_MANAGEMENT_URL"
  if not broker.url or not api_url then
    pending "AMQP_MANAGEMENT_URL is not set: no broker with the management plugin"
    return
  end
  if nginx.missing() then pending(nginx.missing()) return end

  local server
  local queue = unique "led"

  setup(function()
    local ch = ok(broker.connect():channel())
    ok(ch:queue_declare(queue, { durable = true }))
    server = nginx.start {
      main = "env AMQP_MANAGEMENT_URL;",
      env = { AMQP_MANAGEMENT_URL = api_url, LED = queue },
      http = [[
        init_worker_by_lua_block {
          require "moonrabbit.resty".start { uri = os.getenv "AMQP_URL", mode = "smart",
            management = os.getenv "AMQP_MANAGEMENT_URL" }
        }
      ]],
      server = [[
        location /ping { return 200; }
        location /nodes {
          content_by_lua_block {
            local management = require "moonrabbit.management"
            local api = management.new { uri = os.getenv "AMQP_MANAGEMENT_URL",
              runtime = require "moonrabbit.runtime.resty" }
            local nodes = assert(api:nodes())
            local none, err = api:queue("/", "surely-not-there")
            ngx.say(#nodes, " ", tostring(nodes[1].running), " ", tostring(none), " ", err.kind, " ", err.code)
          }
        }
        location /smart {
          content_by_lua_block {
            local rabbit = require "moonrabbit.resty"
            local conn, err = rabbit.connect { uri = os.getenv "AMQP_URL", mode = "smart", near = ngx.var.arg_near,
              management = ngx.var.arg_api or os.getenv "AMQP_MANAGEMENT_URL", smart = { wait = 5 } }
            if not conn then return ngx.say(tostring(err)) end
            local ch = assert(conn:channel { confirm = true })
            assert(ch:publish("x", { routing_key = ngx.var.arg_near }))
            local found = 0
            for _ in pairs(conn._source.nodes) do found = found + 1 end
            ngx.say(found, " ", conn._source.leader or "unknown")
            conn:close(5)
          }
        }
        location /publish {
          content_by_lua_block {
            local sent, err = require "moonrabbit.resty".publish("x", { routing_key = ngx.var.arg_near, timeout = 10 })
            ngx.say(tostring(sent), " ", tostring(err))
          }
        }
      ]],
    }
    server:ready "/ping"
  end)

  teardown(function()
    server:stop()
    local ch = ok(broker.connect():channel())
    ch:queue_delete(queue)
    broker.close_all()
  end)

  local function get(path) return (server:request(path)) or server:log() end

  it("answers, and refuses", function() assert.equal("1 true nil http 404\n", get "/nodes") end)

  it("lets a connection learn the nodes, and the leader of a queue", function()
    local leader = ok(broker.management():leader("/", queue)).leader
    assert.equal("1 " .. leader .. "\n", get("/smart?near=" .. queue))
  end)

  it("may be missing: the connection goes on with what it knows, and says so", function()
    assert.equal("0 unknown\n", get("/smart?near=" .. queue .. "&api=http://127.0.0.1:1"))
    assert.matches("the nodes of the cluster cannot be learned: .*going on with what is known", server:log())
  end)

  it("serves a worker's own connections", function()
    assert.equal("true nil\n", get("/publish?near=" .. queue))
  end)
end)
