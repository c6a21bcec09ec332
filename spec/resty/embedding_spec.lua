-- moonrabbit.resty inside what Kong and APISIX make of nginx: their patches of ngx_lua, as far as they meet it, and their
-- hooks. The plugins are those of docs/openresty.md.
local broker = require "support.broker"
local nginx = require "support.nginx"
local process = require "support.process"
local ok = broker.ok

-- The block of the page that follows a line with this in it.
local function documented(mark)
  local text = process.slurp "docs/openresty.md"
  local from = assert(text:find(mark, 1, true), "docs/openresty.md lacks " .. mark)
  return assert(text:match("\n```text\n(.-\n)```", from))
end

local kong_handler = "/opt/plugins/kong/plugins/rabbit/handler.lua:"

-- Kong: timers are jobs of a few loops, names are looked up by its own client in the connect of each socket, and the clock
-- of the system is declared with a type of its own.
local kong = [[
  init_by_lua_block {
    require "ffi".cdef [=[
      typedef int clockid_t;
      typedef struct timespec { long tv_sec; long tv_nsec; } nanotime;
      int clock_gettime(clockid_t clk_id, struct timespec *tp);
    ]=]
    native_timer_at = ngx.timer.at
    function ngx.timer.at() error "the wheel of timers was used" end
    local new = ngx.socket.tcp
    function ngx.socket.tcp(...)
      local socket = new(...)
      local connect = socket.connect
      function socket.connect(self, host, port, ...)
        if host == "nowhere.kong" then return nil, "[cosocket] DNS resolution failed: dns server error" end
        if host == "nowhere.apisix" then return nil, "failed to parse domain: failed to query the DNS server" end
        return connect(self, host == "broker.kong" and "127.0.0.1" or host, port, ...)
      end
      return socket
    end
    kong = { configuration = { role = "$role" }, log = { serialize = function() return { uri = ngx.var.uri } end } }
    Handler = dofile "$plugin"
    Plugin = { init = function() Handler:init_worker() end, log = function() Handler:log {} end }
  }
]]

local apisix = [[
  init_worker_by_lua_block {
    package.preload["apisix.core"] = function() return { json = require "cjson.safe" } end
    package.preload["apisix.utils.log-util"] = function()
      return { get_log_entry = function(name) return { uri = ngx.var.uri, by = name } end }
    end
    -- A reload of plugins forgets the module, loads it again and calls its init.
    function Load()
      Plugin = dofile "$plugin"
      Plugin.init()
    end
    Load()
  }
]]

local locations = [[
  location = /ping { return 200; }
  location = /reload { content_by_lua_block { Load() ngx.say "reloaded" } }
  location = /metrics { content_by_lua_block { require "moonrabbit.resty.metrics".serve() } }
  location = /started { content_by_lua_block { ngx.say(tostring(pcall(require "moonrabbit.resty".stats))) } }
  location = /kind {
    content_by_lua_block { ngx.say(select(2, require "moonrabbit.resty".publish("x", { timeout = 0.5 })).kind) }
  }
  location = /access {
    content_by_lua_block {
      ngx.say(tostring(require "moonrabbit.resty".publish("access", { routing_key = ngx.var.arg_queue })))
    }
    log_by_lua_block { Plugin.log({}, {}) }
  }
]]

describe("moonrabbit in Kong and APISIX #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local channel, queue, server, plugin

  before_each(function()
    channel = ok(broker.connect():channel())
    queue = broker.unique "embedded"
    ok(channel:queue_declare(queue))
    ok(channel:exchange_declare("access", { type = "topic", durable = true }))
    ok(channel:queue_bind(queue, "access", "#"))
  end)

  after_each(function()
    if server then server:stop() end
    if plugin then os.remove(plugin) end
    server, plugin = nil, nil
    channel:queue_delete(queue)
    channel:exchange_delete "access"
    broker.close_all()
  end)

  -- host: of the broker; page: what names the plugin's block.
  local function start(host, http, page, what)
    plugin = process.file(documented(page))
    what = what or {}
    local values = { plugin = plugin, role = what.role or "traditional" }
    what.env = { AMQP_URL = broker.uri { host = host, port = broker.parsed().port } }
    what.http = "lua_shared_dict moonrabbit 1m;\n" .. http:gsub("%$(%l+)", values)
    what.server = locations
    server = nginx.start(what)
    server:ready "/ping"
  end

  local function start_kong(host, what)
    start(host, kong .. "init_worker_by_lua_block { Plugin.init() }", kong_handler, what)
  end

  local function start_apisix(what)
    start(broker.parsed().host, apisix, "/opt/plugins/apisix/plugins/rabbit.lua:", what)
  end

  local function publishes_and_leaves(logged)
    assert.equal("true\n", (server:request("/access?queue=" .. queue)), server:log())
    broker.eventually(function()
      return ((server:request "/metrics") or ""):find "moonrabbit_publish%S*{[^}\n]*} 1\n"
    end, 10, "the publish is on the page")
    local pids = server:workers()
    server:signal "QUIT"
    nginx.gone(pids, 8)
    local bodies = {}
    for _ = 1, 2 do bodies[#bodies + 1] = ok(channel:get(queue, { no_ack = true })).body end
    table.sort(bodies)
    assert.equal("access", bodies[1])
    assert.same(logged, require "cjson".decode(bodies[2]))
  end

  it("uses nginx's own timers, a clock of its own and Kong's names", function()
    start_kong "broker.kong"
    publishes_and_leaves { uri = "/access" }
  end)

  it("makes no connection in a control plane of Kong", function()
    start_kong("broker.kong", { role = "control_plane" })
    assert.equal("false\n", (server:request "/started"))
  end)

  it("is not loaded by Kong's plugin where streams are proxied", function()
    local environment = { ngx = { config = { subsystem = "stream" } } }
    local handler = assert(load(documented(kong_handler), "handler", "t", environment))()
    assert.same({ PRIORITY = 5, VERSION = "1.0.0" }, handler)
  end)

  it("has a schema for Kong", function()
    local environment = { require = function(name)
      assert.equal("kong.db.schema.typedefs", name)
      return { protocols_http = "http" }
    end }
    local schema = assert(load(documented "and schema.lua beside it:", "schema", "t", environment))()
    assert.equal("rabbit", schema.name)
    assert.same({ protocols = "http" }, schema.fields[1])
  end)

  it("knows names that Kong and APISIX do not find for what they are", function()
    for _, host in ipairs { "nowhere.kong", "nowhere.apisix" } do
      start_kong(host)
      assert.equal("dns\n", (server:request "/kind"), server:log())
      server:stop()
      os.remove(plugin)
    end
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
    start_apisix { workers = 2 }
    local function connected() return select(2, server:log():gsub("publishing: connected to", "")) end
    broker.eventually(function() return connected() >= 2 end, 10, "both workers are connected")
    assert.equal("reloaded\n", (server:request "/reload"), server:log())
    publishes_and_leaves { uri = "/access", by = "rabbit" }
    assert.equal(2, connected(), server:log())
  end)
end)
