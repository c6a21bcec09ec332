# moonrabbit: make help
#
# Honoured: CC CFLAGS LDFLAGS LIBFLAG LUA LUA_INCDIR RABBITMQ_INCDIR RABBITMQ_LIBDIR OPENSSL_INCDIR
# OPENSSL_LIBDIR PREFIX DESTDIR WERROR (-Werror in lint). BUILD is the folder everything goes into; SAN=1 is the variant with
# AddressSanitizer and UBSan, in $(BUILD)/san. DEPS=no leaves the system's packages unchecked; V=1 shows whole commands.

BUILD    ?= build
PREFIX   ?= /usr/local
INSTALL  ?= install
CC       ?= cc
CLANG    ?= clang
LIBFLAG  ?= -shared
WERROR   ?=
DEPS     ?= yes

ifdef SAN
  override BUILD := $(BUILD)/san
  CFLAGS ?= -O1 -g
  sanitize := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
else
  CFLAGS ?= -O2 -g
  sanitize :=
endif

warnings := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition \
            -Wpointer-arith -Wwrite-strings -Wundef -Wvla -Wformat=2 -Wno-format-nonliteral $(WERROR)
flags    := -std=c11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -Icsrc $(warnings) $(sanitize)
depflags  = -MMD -MP

rabbitmq_inc := $(if $(RABBITMQ_INCDIR),-I$(RABBITMQ_INCDIR))
rabbitmq_lib := $(if $(RABBITMQ_LIBDIR),-L$(RABBITMQ_LIBDIR)) -lrabbitmq -lm
openssl_inc  := $(if $(OPENSSL_INCDIR),-I$(OPENSSL_INCDIR))
openssl_lib  := $(if $(OPENSSL_LIBDIR),-L$(OPENSSL_LIBDIR)) -lssl -lcrypto -lpthread

# ---- Which Luas --------------------------------------------------------------------------------
# All whose headers are installed; the one of LUA when the caller names LUA or LUA_INCDIR. LuaJIT
# loads the 5.1 binary, so that one is always built against PUC Lua's headers.

default_lua := $(firstword $(foreach l,lua5.4 lua5.3 lua5.2 lua5.1 lua luajit,$(if $(shell command -v $l),$l)))
ifneq ($(LUA)$(LUA_INCDIR),)
  one_lua := yes
endif
LUA ?= $(default_lua)
lua_version = $(or $(shell $(LUA) -e 'io.write((_VERSION:gsub("Lua ", "")))' 2>/dev/null),5.4)
lua_incdir  = $(or $(LUA_INCDIR),$(patsubst %/lua.h,%,$(firstword $(wildcard \
              /usr/include/lua$1/lua.h /usr/local/include/lua$1/lua.h \
              /usr/include/lua-$1/lua.h /usr/local/include/lua-$1/lua.h))))

ifdef one_lua
  VERSIONS ?= $(lua_version)
else
  VERSIONS ?= $(foreach v,5.1 5.2 5.3 5.4,$(if $(call lua_incdir,$v),$v))
endif

# ---- Sources -----------------------------------------------------------------------------------

core_src    := $(wildcard csrc/core/*.c)
net_src     := $(wildcard csrc/net/*.c)
compat_src  := $(wildcard csrc/lua/compat*.c)
bind_net    := $(wildcard csrc/lua/net*.c)
bind_core   := $(filter-out $(bind_net) $(compat_src),$(wildcard csrc/lua/*.c))
test_src    := $(wildcard spec/core/*.c)
test_net    := $(wildcard spec/net/*.c)
test_common := $(wildcard spec/core/support/*.c)
fuzz_src    := $(wildcard spec/fuzz/*.c)

core_obj := $(core_src:csrc/%.c=$(BUILD)/obj/%.o)
net_obj  := $(net_src:csrc/%.c=$(BUILD)/obj/%.o)
modules  := $(foreach v,$(VERSIONS),$(if $(bind_core),$(BUILD)/$v/moonrabbit/core.so) \
                                    $(if $(bind_net),$(BUILD)/$v/moonrabbit/net.so))
tests    := $(test_src:spec/core/%.c=$(BUILD)/test/%) $(test_net:spec/net/%.c=$(BUILD)/test/net-%) \
            $(if $(SAN),$(BUILD)/test/keep_loaded.so)
fuzzers  := $(fuzz_src:spec/fuzz/%.c=$(BUILD)/fuzz/%)

# One short line for each file; the whole commands with V=1.
ifdef V
  say = @:
  Q :=
else
  say = @echo
  Q := @
endif

.PHONY: all modules unit fuzzers deps demo test lint format rock bench chaos fuzz docs install clean help
.DELETE_ON_ERROR:
.SECONDARY:

all: modules ## build the C modules for every installed Lua (or for LUA=...)
	@$(if $(strip $(VERSIONS)),:,echo 'no Lua headers found: run "make deps", or set LUA and LUA_INCDIR' >&2; exit 1)

modules: $(modules)
unit: $(tests)
fuzzers: $(fuzzers)

# ---- Objects and modules -----------------------------------------------------------------------

$(BUILD)/obj/core/%.o: csrc/core/%.c Makefile
	@mkdir -p $(@D)
	$(say) '  cc    $@'
	$(Q)$(CC) $(flags) $(depflags) $(rabbitmq_inc) $(CFLAGS) -c -o $@ $<

$(BUILD)/obj/net/%.o: csrc/net/%.c Makefile
	@mkdir -p $(@D)
	$(say) '  cc    $@'
	$(Q)$(CC) $(flags) $(depflags) $(openssl_inc) $(CFLAGS) -c -o $@ $<

define per_lua
$(BUILD)/obj/lua$1/%.o: csrc/lua/%.c Makefile
	@mkdir -p $$(@D)
	$$(say) '  cc    $$@'
	$$(Q)$$(CC) $$(flags) $$(depflags) -isystem $$(call lua_incdir,$1) $$(rabbitmq_inc) $$(openssl_inc) \
	  $$(CFLAGS) -c -o $$@ $$<

$(BUILD)/$1/moonrabbit/core.so: $$(patsubst csrc/lua/%.c,$(BUILD)/obj/lua$1/%.o,$(bind_core) $(compat_src)) $(core_obj)
	@mkdir -p $$(@D)
	$$(say) '  link  $$@'
	$$(Q)$$(CC) $$(LIBFLAG) $$(sanitize) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$^ $$(rabbitmq_lib)

$(BUILD)/$1/moonrabbit/net.so: $$(patsubst csrc/lua/%.c,$(BUILD)/obj/lua$1/%.o,$(bind_net) $(compat_src)) $(net_obj)
	@mkdir -p $$(@D)
	$$(say) '  link  $$@'
	$$(Q)$$(CC) $$(LIBFLAG) $$(sanitize) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$^ $$(openssl_lib)
endef
$(foreach v,$(VERSIONS),$(eval $(call per_lua,$v)))

# ---- C unit tests: each spec/core/*.c is a program, spec/core/support/*.c is linked into all ------

$(BUILD)/test/%: spec/core/%.c $(test_common) $(core_obj) Makefile
	@mkdir -p $(@D)
	$(say) '  cc    $@'
	$(Q)$(CC) $(flags) $(depflags) -Ispec/core $(rabbitmq_inc) $(CFLAGS) $(LDFLAGS) -o $@ \
	  $< $(test_common) $(core_obj) $(rabbitmq_lib) -ldl -lpthread

$(BUILD)/test/net-%: spec/net/%.c $(test_common) $(net_obj) Makefile
	@mkdir -p $(@D)
	$(say) '  cc    $@'
	$(Q)$(CC) $(flags) $(depflags) -Ispec/core -Ispec/net $(openssl_inc) $(CFLAGS) $(LDFLAGS) -o $@ \
	  $< $(test_common) $(net_obj) $(openssl_lib) -ldl

$(BUILD)/test/keep_loaded.so: spec/support/keep_loaded.c Makefile
	@mkdir -p $(@D)
	$(say) '  cc    $@'
	$(Q)$(CC) $(LIBFLAG) -std=c11 -fPIC $(warnings) -o $@ $<

# ---- Fuzzers: libFuzzer with the core built for it ----------------------------------------------
# spec/fuzz/lua_*.c may also embed Lua 5.4 and the binding.

fuzz_flags = -std=c11 -D_GNU_SOURCE -Icsrc -g -O1 -fno-omit-frame-pointer -Wall -Wextra $(WERROR) \
             -fno-sanitize-recover=undefined $(rabbitmq_inc) $(openssl_inc)
fuzz_obj  := $(core_src:csrc/%.c=$(BUILD)/fuzz/obj/%.o) $(net_src:csrc/%.c=$(BUILD)/fuzz/obj/%.o)
fuzz_bind := $(patsubst csrc/%.c,$(BUILD)/fuzz/obj/%.o,$(bind_core) $(bind_net) $(compat_src))
fuzz_libs  = $(rabbitmq_lib) $(openssl_lib) -ldl -lm

$(BUILD)/fuzz/obj/lua/%.o: csrc/lua/%.c Makefile
	@mkdir -p $(@D)
	$(say) '  clang $@'
	$(Q)$(CLANG) $(fuzz_flags) $(depflags) -isystem $(call lua_incdir,5.4) \
	  -fsanitize=fuzzer-no-link,address,undefined -c -o $@ $<

$(BUILD)/fuzz/obj/%.o: csrc/%.c Makefile
	@mkdir -p $(@D)
	$(say) '  clang $@'
	$(Q)$(CLANG) $(fuzz_flags) $(depflags) -fsanitize=fuzzer-no-link,address,undefined -c -o $@ $<

$(filter $(BUILD)/fuzz/lua_%,$(fuzzers)): $(BUILD)/fuzz/%: spec/fuzz/%.c $(fuzz_obj) $(fuzz_bind) Makefile
	@mkdir -p $(@D)
	$(say) '  clang $@'
	$(Q)$(CLANG) $(fuzz_flags) $(depflags) -isystem $(call lua_incdir,5.4) -fsanitize=fuzzer,address,undefined \
	  -o $@ $< $(fuzz_obj) $(fuzz_bind) -llua5.4 $(fuzz_libs)

$(filter-out $(BUILD)/fuzz/lua_%,$(fuzzers)): $(BUILD)/fuzz/%: spec/fuzz/%.c $(fuzz_obj) Makefile
	@mkdir -p $(@D)
	$(say) '  clang $@'
	$(Q)$(CLANG) $(fuzz_flags) $(depflags) -fsanitize=fuzzer,address,undefined -o $@ $< $(fuzz_obj) $(fuzz_libs)

# ---- What people run ---------------------------------------------------------------------------

check_deps  = $(if $(filter no,$(DEPS)),:,scripts/deps $1)
broker_deps = $(if $(AMQP_URL),,broker)

deps: ## install what building and testing need (Debian packages), or say what is missing
	@scripts/deps build broker test

demo: ## a shop on a real broker of its own (or on AMQP_URL): retries, dead letters, a kill -9, 0 lost; one minute
	@$(call check_deps,$(broker_deps) demo)
	@$(MAKE) --no-print-directory all
	@scripts/demo

test: ## the whole suite; its last line counts what passed and failed
	@$(call check_deps,build $(broker_deps) test)
	@scripts/test

lint: ## compile with gcc and clang, clang-tidy, clang-format, luacheck, shellcheck
	@$(call check_deps,build test)
	@scripts/lint

format: ## let clang-format rewrite the C files, then lint
	@scripts/lint --fix

bench: ## clients and consumer frameworks beside moonrabbit, memory; half an hour, QUICK=1 for under five minutes
	@$(call check_deps,build $(broker_deps) bench)
	@$(MAKE) --no-print-directory all
	@QUICK='$(QUICK)' bench/run
	@bench/with-null lua5.4 bench/many.lua
	@bench/with-null lua5.4 bench/soak.lua -- $(if $(QUICK),1000000)
	@bench/frameworks $(if $(QUICK),--messages 3000 --runs 3)

chaos: ## faults against a cluster of its own, lost messages counted (docs/chaos.md); QUICK=1 for three minutes
	@$(call check_deps,build broker chaos)
	@$(MAKE) --no-print-directory all
	@chaos/run $(if $(QUICK),--quick)

fuzz: ## run every fuzzer for FUZZ_SECONDS (60)
	@scripts/fuzz

rock: ## build and load the LuaRocks module under every Lua, in build/rocks
	@scripts/rocks-test

docs: ## the API manual, into build/docs
	@$(call check_deps,build test)
	@rm -rf $(BUILD)/docs $(BUILD)/docs-source
	@scripts/ldoc-prepare lua $(BUILD)/docs-source
	ldoc -c config.ld -d $(BUILD)/docs $(BUILD)/docs-source

install: all ## into DESTDIR and PREFIX, for one Lua: make install LUA=lua5.3 PREFIX=/usr
	@set -e; v=$(lua_version); root='$(DESTDIR)$(PREFIX)'; \
	test -f "$(BUILD)/$$v/moonrabbit/core.so" || { echo "nothing built for Lua $$v" >&2; exit 1; }; \
	find lua -name '*.lua' | sed 's|^lua/||' | while read -r f; do \
	  $(INSTALL) -D -m 644 "lua/$$f" "$$root/share/lua/$$v/$$f"; done; \
	for m in core net; do \
	  if test -f "$(BUILD)/$$v/moonrabbit/$$m.so"; then \
	    $(INSTALL) -D -m 755 "$(BUILD)/$$v/moonrabbit/$$m.so" "$$root/lib/lua/$$v/moonrabbit/$$m.so"; fi; done; \
	if test -f bin/moonrabbit; then \
	  mkdir -p "$$root/bin"; \
	  sed '1s|^#!.*|#!/usr/bin/env $(notdir $(LUA))|' bin/moonrabbit > "$$root/bin/moonrabbit"; \
	  chmod 755 "$$root/bin/moonrabbit"; fi; \
	echo "installed moonrabbit for Lua $$v under $$root"

clean: ## stop our brokers and remove the build folder
	@if test -d $(BUILD)/broker; then scripts/broker stop-all; fi
	rm -rf $(BUILD)

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s%s\n", $$1, $$2 }'

-include $(wildcard $(BUILD)/obj/*/*.d $(BUILD)/test/*.d $(BUILD)/fuzz/*.d $(BUILD)/fuzz/obj/*/*.d)
