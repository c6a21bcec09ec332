-- Configuration by environment, and secrets.
local config = require "moonrabbit.config"
local log = require "moonrabbit.log"
local output = require "moonrabbit.cli.output"
local process = require "support.process"
local script = require "moonrabbit.life.script"
local secret = require "moonrabbit.secret"

local unset = "MOONRABBIT_SPEC_NOT_SET"

-- HOME is set wherever specs run.
local home = os.getenv "HOME"

local function fails(text, fn, ...)
  local ok, err = pcall(fn, ...)
  assert.is_false(ok)
  assert.truthy(tostring(err):find(text, 1, true), tostring(err))
end

describe("mr.config", function()
  after_each(function() config.choose(nil) end)

  local function environments()
    return {
      default = {
        url = "amqp://localhost/", concurrency = 4, redis = { host = "localhost", port = 6379 }, list = { 1, 2 },
      },
      staging = {},
      production = { url = "amqps://x/", redis = { host = "redis" }, list = { 3 }, extra = true },
    }
  end

  it("lays the chosen environment over the default one", function()
    local c = config(environments(), "production")
    assert.equal("amqps://x/", c.url)
    assert.equal(4, c.concurrency)
    assert.same({ host = "redis", port = 6379 }, c.redis)
    assert.same({ 3 }, c.list)
    assert.is_true(c.extra)
    assert.equal("moonrabbit.config (production)", tostring(c))
  end)

  it("takes what was chosen, else the default, and changes neither", function()
    local all = environments()
    assert.equal("amqp://localhost/", config(all).url)
    config.choose "production"
    assert.equal("amqps://x/", config(all).url)
    config.choose "default"
    assert.equal("amqp://localhost/", config(all).url)
    assert.same(environments(), all)
  end)

  it("says which environments there are", function()
    fails("there is no environment 'prodution' (did you mean 'production'?); there are: default, production, staging",
      config, environments(), "prodution")
    fails("no environment is chosen (--env, or MOONRABBIT_ENV), and there is no 'default'; there are: a, b",
      config, { a = {}, b = {} })
    fails("config_spec.lua:", function() local _ = config({ a = {} }, "b") end)
  end)

  it("throws for a field that no environment has, with the name that was meant", function()
    local c = config(environments(), "staging")
    assert.is_nil(c.extra) -- others have it
    fails("no environment has a field 'concurency' (did you mean 'concurrency'?)", function() return c.concurency end)
  end)

  it("calls an environment that is a function, when it is chosen", function()
    local all = { a = function() return { x = 1 } end, b = function() error "must not run" end }
    local c = config(all, "a")
    assert.equal(1, c.x)
    assert.is_nil(c.whatever)
    fails("the environment 'c' is a number, and no table", config, { c = function() return 3 end }, "c")
  end)

  it("reads the values that it is told to, of the chosen environment only", function()
    local path = process.file "42\n"
    local all = {
      a = { home = config.env "HOME", n = config.env(unset, 7), deep = { file = config.file(path) } },
      b = { x = config.env(unset) }, c = { y = { z = config.file(path .. ".none") } },
    }
    local c = config(all, "a")
    assert.same({ home, 7, "42" }, { c.home, c.n, c.deep.file })
    os.remove(path)
    fails("mr.config: x: the environment variable " .. unset .. " is not set", config, all, "b")
    fails("y.z: it cannot be read: " .. path .. ".none: No such file", config, all, "c")
  end)

  it("makes of a variable what the default is, and never shows its value", function()
    fails("the environment variable HOME is no number", config, { default = { n = config.env("HOME", 1) } })
    fails("the environment variable HOME is neither true nor false", config,
      { default = { n = config.env("HOME", true) } })
    local _, err = pcall(config, { default = { n = config.env("HOME", 1) } })
    assert.is_nil(err:find(home, 1, true))
  end)

  it("refuses nonsense", function()
    fails("a table of environments expected, not a string", config, "production")
    fails("there are no environments", config, {})
    fails("environments have names", config, { {} })
    fails("the environment 'a' is a number, and no table", config, { a = 1 })
    fails("name must be a string", config, { a = {} }, 3)
    fails("a name expected", config.env, 3)
    fails("the default must be a string, a number or a boolean", config.env, "X", {})
    local endless = {}
    endless.x = endless
    fails("more than 20 deep", config, { default = endless })
    fails("more than 20 deep", config, { default = endless, a = endless }, "a")
  end)
end)

describe("secrets", function()
  it("are read anew each time they are asked for, without the line's end", function()
    local path = process.file "first-secret\r\n"
    local ask = secret.file(path)
    assert.equal("first-secret", ask())
    local file = assert(io.open(path, "wb"))
    file:write "second-secret"
    file:close()
    assert.equal("second-secret", ask())
    os.remove(path)
    local value, why = ask()
    assert.is_nil(value)
    assert.truthy(why:find(path, 1, true))
  end)

  it("say what is missing", function()
    local function why(ask) return select(2, ask()) end
    assert.equal("the environment variable " .. unset .. " is not set", why(secret.env(unset)))
    local path = process.file ""
    assert.equal("the file " .. path .. " is empty", why(secret.file(path)))
    local file = assert(io.open(path, "wb"))
    file:write(("x"):rep(70000))
    file:close()
    assert.truthy(why(secret.file(path)):find("larger than", 1, true))
    os.remove(path)
    assert.truthy(why(secret.file "/"):find("cannot be read", 1, true))
    assert.equal("the vault is sealed", why(secret.from(function() return nil, "the vault is sealed" end)))
    assert.equal("the function gave none", why(secret.from(function() end)))
    assert.truthy(why(secret.from(function() return 3 end)):find("a number, and no string", 1, true))
    assert.equal("boom", (select(2, secret.check(secret.from(function() error("boom", 0) end)))))
  end)

  it("refuse nonsense", function()
    fails("a variable's name expected, not nothing", secret.env, "")
    fails("a path expected, not a nil", secret.file)
    fails("a function expected, not a string", secret.from, "x")
  end)

  it("are the same when they are one already", function()
    local ask = secret.env "HOME"
    assert.equal(ask, secret.from(ask))
    assert.is_true(secret.is(ask))
    assert.is_false(secret.is(print))
    assert.is_false(secret.is "text")
  end)

  it("appear in no log and no complaint, encoded neither", function()
    local value = "tick/tock 4711"
    assert.equal(value, secret.from(function() return value end)())
    local lines = {}
    local write = log.new { format = "json", write = function(line) lines[#lines + 1] = line end }
    write("error", "got " .. value .. " twice " .. value, { why = { deep = "it is " .. value } })
    assert.is_nil(lines[1]:find("tick", 1, true), lines[1])
    assert.truthy(lines[1]:find("got *** twice ***", 1, true), lines[1])
    assert.equal("x *** y", output.redact "x tick%2Ftock%204711 y")
  end)

  it("that are many do not fill the memory: the latest are known", function()
    for i = 1, 500 do secret.remember(("number-%d-of-many"):format(i)) end
    assert.equal("***", secret.blot "number-500-of-many")
    assert.equal("number-1-of-many", secret.blot "number-1-of-many")
    secret.remember "abc" -- would be found in everything
    assert.equal("abc", secret.blot "abc")
  end)
end)

describe("the script of an app", function()
  local path
  after_each(function()
    os.remove(path)
    config.choose(nil)
  end)

  local function load(text, environment)
    path = process.file("local mr = require 'moonrabbit'\n" .. text)
    return script.load(path, environment)
  end

  local app = "return mr.app { name = 'x', connect = { password = %s }, queues = { q = {} },"
    .. " consumers = { { queue = 'q', handler = print } } }"

  it("is loaded for an environment", function()
    local text = "local c = mr.config { default = { q = 'q' }, production = { p = mr.secret.env '" .. unset .. "' } }\n"
      .. app:format "c.p"
    local loaded = assert(load(text))
    assert.is_true(script.verify(loaded))
    os.remove(path)
    loaded = assert(load(text, "production"))
    local ok, problem = script.verify(loaded)
    assert.is_nil(ok)
    assert.equal("the secret p: the environment variable " .. unset .. " is not set", problem)
  end)

  it("that knows no environments is not loaded for one", function()
    local loaded, problem = load(app:format "'x'", "production")
    assert.is_nil(loaded)
    assert.truthy(problem:find("there is no environment 'production', for the script has none", 1, true))
  end)

  it("names the line of an environment that there is not", function()
    local loaded, problem = load("\nlocal c = mr.config { a = {} }\n" .. app:format "c.p", "b")
    assert.is_nil(loaded)
    assert.truthy(problem:find(":3: mr.config: there is no environment 'b'", 1, true), problem)
  end)

  it("is asked for the secrets that it connects with, outside of mr.config too", function()
    local _, problem = script.verify(assert(load(app:format("mr.secret.file '/nowhere/amqp'"))))
    assert.equal("the secret connect.password: it cannot be read: /nowhere/amqp: No such file or directory", problem)
  end)
end)
