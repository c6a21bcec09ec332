-- Where an app connects to that a command runs: the script's `connect`, and over it what is said outside.
local app_connection = require "moonrabbit.cli.app_connection"
local mr = require "moonrabbit"
local output = require "moonrabbit.cli.output"
local process = require "support.process"

local OUTER = { "MOONRABBIT_URL", "AMQP_URL", "MOONRABBIT_PASSWORD" }

describe("the connection of an app that a command runs", function()
  local getenv, env = os.getenv, {}

  before_each(function()
    env = {}
    local known = {}
    for _, name in ipairs(OUTER) do known[name] = true end
    os.getenv = function(name) if known[name] then return env[name] end return getenv(name) end -- luacheck: ignore 122
  end)

  after_each(function() os.getenv = getenv end) -- luacheck: ignore 122

  local function app(connect)
    return mr.app { name = "a", connect = connect, queues = { q = {} }, consumers = { { queue = "q",
      handler = print } } }
  end

  local function options(connect, args) return app_connection.options(app(connect), args or {}) end

  -- What a connection makes of it.
  local function target(connect, args)
    local given, source = options(connect, args)
    if not given then return nil, source end
    require("moonrabbit.connection.options").check(given, 1)
    local found = assert(app_connection.first(given))
    if type(found.password) == "function" then found.password = assert(found.password()) end
    return found, given, source
  end

  local function secret() return "from-a-file" end

  local own = {
    uri = "amqps://rabbit.example/shop", user = "orders", password = secret, heartbeat = 20, name = "orders",
    reconnect = { max = 3 }, tls = { ca = "/ca.pem", server_name = "rabbit.example", verify = false }, timeout = 7,
  }

  it("is the script's where nothing is said outside", function()
    local found, given, source = target(own)
    assert.equal("the script", source)
    assert.same({ "rabbit.example", 5671, "shop", "orders", "from-a-file", 20 },
      { found.host, found.port, found.vhost, found.user, found.password, found.heartbeat })
    assert.same({ max = 3 }, given.reconnect)
    assert.same(own.tls, given.tls)
  end)

  it("is the default where neither says anything", function()
    local found, _, source = target(nil)
    assert.equal("the default", source)
    assert.same({ "localhost", 5672, "/", "guest" }, { found.host, found.port, found.vhost, found.user })
    found = target { heartbeat = 9 }
    assert.same({ "localhost", 9 }, { found.host, found.heartbeat })
  end)

  it("takes a URL from outside for the place, and keeps what it does not say", function()
    for _, name in ipairs { "AMQP_URL", "MOONRABBIT_URL" } do
      env = { [name] = "amqp://localhost/" }
      local found, given, source = target(own)
      assert.equal(name, source)
      assert.same({ "localhost", 5672, "/", "orders", "from-a-file", 20 },
        { found.host, found.port, found.vhost, found.user, found.password, found.heartbeat })
      assert.is_nil(found.tls)
      assert.same({ "orders", 3, 7 }, { given.name, given.reconnect.max, given.timeout })
    end
  end)

  it("lets the URL have its say where it says more", function()
    env.AMQP_URL = "amqp://guest:guest@localhost/?heartbeat=5&connection_timeout=2000&auth_mechanism=amqplain"
    local found = target { uri = "amqp://x/", user = "orders", password = secret, heartbeat = 20, connect_timeout = 9,
      mechanism = "PLAIN", frame_max = 8192 }
    assert.same({ "guest", "guest", 5, 2, "AMQPLAIN", 8192 }, { found.user, found.password, found.heartbeat,
      found.connect_timeout, found.mechanism, found.frame_max })
  end)

  it("has a place for each that is listed, with what the site says of its own", function()
    local primary = { endpoints = { "amqp://a/", "amqp://b/" }, mode = "smart", password = secret }
    local given = assert(options { user = "all", sites = { primary = primary,
      standby = { uri = "amqps://c/", user = "other", password = "standby-word", tls = { ca = "/ca.pem" } } } })
    assert.equal(secret, primary.password)
    local names = {}
    for i, place in ipairs(assert(app_connection.places(given))) do
      names[i] = ("%s %s@%s"):format(place.site, place.parsed.user, place.parsed.host)
      require("moonrabbit.connection.options").check(place.options, 1)
      assert.is_nil(place.options.sites or place.options.endpoints or place.options.mode)
    end
    assert.same({ "primary all@a", "primary all@b", "standby other@c" }, names)
    assert.equal("***", output.redact "standby-word")
    assert.equal("from-a-file", given.sites.primary.password())
    assert.equal("***", output.redact "from-a-file")
    local none, problem = app_connection.places { mode = "proxy", endpoints = { "amqp://a/", "amqp://b/" } }
    assert.is_nil(none)
    assert.equal("connect: mode \"proxy\" takes one endpoint, the balancer's", problem)
  end)

  it("goes to one place, not to the script's several", function()
    env.AMQP_URL = "amqp://here/"
    local _, given = target { endpoints = { "amqp://a/", "amqp://b/" }, mode = "smart", near = "q", shuffle = true,
      smart = { wait = 1 }, management = "http://a:15672" }
    for _, name in ipairs { "endpoints", "mode", "near", "shuffle", "smart", "management" } do
      assert.is_nil(given[name], name)
    end
    _, given = target { sites = { primary = { uri = "amqp://a/" }, standby = { uri = "amqp://b/" } } }
    assert.is_nil(given.sites)
    env = {}
    local found, all = target { endpoints = { "amqp://a/", "amqp://b/" }, mode = "smart" }
    assert.same({ "a", 2, "smart" }, { found.host, #all.endpoints, all.mode })
    found = target { sites = { primary = { uri = "amqp://a/" }, standby = { uri = "amqp://b/" } } }
    assert.equal("a", found.host)
  end)

  it("uses the script's certificates with the URL's broker, and verifies as the URL says", function()
    env.AMQP_URL = "amqps://elsewhere/"
    local found = target { uri = "amqps://x/", tls = { ca = "/ca.pem", cert = "/c.pem", key = "/k.pem",
      server_name = "x", verify = false, min_version = "1.3" } }
    assert.same({ ca = "/ca.pem", cert = "/c.pem", key = "/k.pem", min_version = "1.3", verify = true,
      server_name = "elsewhere" }, found.tls)
    env.AMQP_URL = "amqps://elsewhere/?cacertfile=/other.pem&verify=verify_none&server_name_indication=name"
    found = target { uri = "amqps://x/", tls = { ca = "/ca.pem" } }
    assert.same({ ca = "/other.pem", verify = false, server_name = "name" }, found.tls)
  end)

  it("puts single options over both", function()
    env.MOONRABBIT_PASSWORD = "typed-password"
    local args = { vhost = "staging", user = "someone", ca = "/mine.pem", timeout = 4 }
    local found, given = target(own, args)
    assert.same({ "rabbit.example", "staging", "someone", "typed-password" },
      { found.host, found.vhost, found.user, found.password })
    assert.same({ ca = "/mine.pem", server_name = "rabbit.example", verify = false }, given.tls)
    assert.same({ 4, 4 }, { given.timeout, given.connect_timeout })
    env.AMQP_URL = "amqps://localhost/prod"
    found = target(own, args)
    assert.same({ "localhost", "staging", "someone", "typed-password", "/mine.pem" },
      { found.host, found.vhost, found.user, found.password, found.tls.ca })
    env = { AMQP_URL = "amqp://localhost/" }
    local none, problem = options(own, { ca = "/mine.pem" })
    assert.is_nil(none)
    assert.equal("TLS options need a URL that starts with amqps://", problem)
  end)

  it("leaves the log and the runtime to the command, and the script's table as it is", function()
    local given = { uri = "amqp://x/", log = print, runtime = "cqueues", heartbeat = 3 }
    local _, all = target(given)
    assert.same({ uri = "amqp://x/", heartbeat = 3 }, all)
    assert.same({ uri = "amqp://x/", log = print, runtime = "cqueues", heartbeat = 3 }, given)
  end)

  it("says what is wrong with a URL, and repeats no password", function()
    env.AMQP_URL = "http://guest:open-sesame@x/"
    local none, problem = options(own)
    assert.is_nil(none)
    assert.truthy(problem:find("(from AMQP_URL)", 1, true), problem)
    assert.is_nil(problem:find("open-sesame", 1, true))
    env = {}
    target { sites = { primary = { uri = "amqp://u:first-secret@a/" },
      standby = { uri = "amqp://u:next-secret@b/" } } }
    target { endpoints = { "amqp://u:third-secret@a/" } }
    for _, word in ipairs { "first", "next", "third" } do
      assert.equal("***", output.redact(word .. "-secret"))
    end
  end)
end)

describe("moonrabbit run", function()
  it("takes its pid file away, and not that of the process that has taken its place", function()
    local native = require "moonrabbit.runtime.native"
    local path, pid = process.file("return require 'moonrabbit'.app { name = 'a', connect = 'amqp://127.0.0.1:1/',"
      .. " queues = { q = {} }, consumers = { { queue = 'q', handler = print } } }"), os.tmpname()
    finally(function()
      os.remove(path)
      os.remove(pid)
    end)
    local function eventually(fn)
      local deadline = native.now() + 10
      repeat native.sleep(0.02) until fn() or native.now() > deadline
      assert.truthy(fn())
    end
    for _, other in ipairs { false, "17" } do
      os.remove(pid)
      local running = process.start({ "bin/moonrabbit", "run", path, "--pid-file", pid }, { unset = OUTER })
      eventually(function() return running:err():find("trying again", 1, true) end)
      assert.equal(tostring(running.pid), process.slurp(pid):match "%d+")
      if other then
        local file = assert(io.open(pid, "w"))
        file:write(other, "\n")
        file:close()
      end
      running:signal "TERM"
      eventually(function() return running:code() end)
      assert.equal(other and other .. "\n" or nil, process.slurp(pid))
    end
  end)

  it("keeps the script's options when AMQP_URL says where", function()
    local native = require "moonrabbit.runtime.native"
    local server = assert(native.listen("127.0.0.1", 0))
    local path = process.file("return require 'moonrabbit'.app { name = 'a', connect = {"
      .. " uri = 'amqp://nowhere.invalid/', user = 'orders', password = 'quite-a-secret', connect_timeout = 0.3 },"
      .. " queues = { q = {} }, consumers = { { queue = 'q', handler = print } } }")
    local running = process.start({ "bin/moonrabbit", "run", path },
      { env = { AMQP_URL = ("amqp://127.0.0.1:%d/"):format(server:port()) } })
    finally(function()
      running:stop()
      server:close()
      os.remove(path)
    end)
    -- A broker that says nothing: the script's 0.3 s pass, not the default's 10.
    local deadline = native.now() + 30
    repeat native.sleep(0.02) until running:err():find("trying again", 1, true) or native.now() > deadline
    assert.truthy(running:err():find("within 0.3 s", 1, true), running:err())
    assert.is_nil(running:err():find("quite-a-secret", 1, true))
  end)
end)
