-- moonrabbit.resty inside what Kong and APISIX make of nginx: their patches of ngx_lua, as far as they meet it, and their
-- hooks. docs/openresty.md tells their users what is written here.
local broker = require "support.broker"
local nginx = require "support.nginx"
local ok = broker.ok

-- Kong: timers are jobs of a few loops, names are looked up by its own client in the connect of each socket.
local kong = [[
  init_by_lua_block {
    native_timer_at, native_timer_every = ngx.timer.at, ngx.timer.every
    function ngx.timer.at() error "the wheel of timers was used" end
    ngx.timer.every = ngx.timer.at
    local new = ngx.socket.tcp
    function ngx.socket.tcp(...)
      local socket = new(...)
      local connect = socket.connect
      function socket.connect(self, host, port, ...)
        return connect(self, host == "broker.kong" and "127.0.0.1" or host, port, ...)
      end
      return socket
    end
  }
]]

-- A plugin as both of them have it, and what calls it.
local plugin = [[
  lua_shared_dict moonrabbit 1m;
  init_worker_by_lua_block {
    local rabbit = require "moonrabbit.resty"
    local log = rabbit.publisher { routing_key = %q }
    Plugin = {}
    function Plugin.init()
      if ngx.get_phase() ~= "init_worker" then return end
      if require "ngx.process".type() ~= "worker" then return end
      rabbit.start { uri = %q, metrics = "moonrabbit" }
    end
    function Plugin.log() assert(log:send_async("logged " .. ngx.var.uri)) end
    function Plugin.access() ngx.say(tostring(rabbit.publish("access", { routing_key = %q }))) end
    Plugin.init()
  }
]]

local locations = [[
  location = /ping { return 200; }
  location = /reload { content_by_lua_block { Plugin.init() ngx.say "reloaded" } }
  location = /metrics { content_by_lua_block { require "moonrabbit.resty.metrics".serve() } }
  location = /access {
    content_by_lua_block { Plugin.access() }
    log_by_lua_block { Plugin.log() }
  }
]]

describe("moonrabbit in Kong and APISIX #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local channel, queue, server

  before_each(function()
    channel = ok(broker.connect():channel())
    queue = broker.unique "embedded"
    ok(channel:queue_declare(queue))
  end)

  after_each(function()
    server:stop()
    channel:queue_delete(queue)
    broker.close_all()
  end)

  local function start(host, http, workers)
    local uri = broker.uri { host = host, port = broker.parsed().port }
    server = nginx.start { http = http .. plugin:format(queue, uri, queue), server = locations,
      workers = workers }
    server:ready "/ping"
  end

  local function publishes_and_leaves()
    assert.equal("true\n", (server:request "/access"), server:log())
    broker.eventually(function()
      return ((server:request "/metrics") or ""):find "moonrabbit_publish%S*{[^}\n]*} 1\n"
    end, 10, "the publish is on the page")
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 5)
    local bodies = {}
    for _ = 1, 2 do bodies[#bodies + 1] = ok(channel:get(queue, { no_ack = true })).body end
    table.sort(bodies)
    assert.same({ "access", "logged /access" }, bodies)
  end

  it("uses nginx's own timers and Kong's names", function()
    start("broker.kong", kong)
    publishes_and_leaves()
  end)

  it("is for the http subsystem", function()
    local started, err = pcall(nginx.start, { http = [[
      init_by_lua_block {
        ngx.config.subsystem = "stream"
        require "moonrabbit.resty"
      }
    ]] })
    if started then err:stop() end
    assert.is_false(started)
    assert.matches("moonrabbit.resty is for the http subsystem of nginx", err)
  end)

  it("is started once, whatever APISIX calls init for", function()
    start(broker.parsed().host, "", 2)
    assert.equal("reloaded\n", (server:request "/reload"), server:log())
    publishes_and_leaves()
    local _, connected = server:log():gsub("publishing: connected to", "")
    assert.equal(2, connected, server:log())
  end)
end)
